"""Large chains are stepped one after the other, in place: the numbers are those of chains that move as one tensor."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.objective import ModuleObjective
from icl.streams import Stream

D = 11
INPUTS = Stream(0, "test/large/x").normal(0, (24, D))
BATCHES = [INPUTS[:12], INPUTS[12:]]
FIXED = SamplerConfig(num_chains=3, num_draws=40, num_burnin_steps=5, epsilon=1e-3, gamma=1.0, nbeta=10.0, init_seed=3)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1))


def squares(predict, batch):
    return (predict(batch)[:, 0] - batch[:, 0]).square().mean()


def estimates(monkeypatch, config, **more):
    """As one tensor, and one by one; neither vectorised."""
    monkeypatch.setattr("icl.sampling.objective.VECTORISE_BELOW", 0)
    together = estimate_llc(model(), squares, BATCHES, config, **more)
    monkeypatch.setattr("icl.sampling.chains.ONE_BY_ONE", 0)
    monkeypatch.setattr("icl.sampling.pieces.PIECE", 8)
    return together, estimate_llc(model(), squares, BATCHES, config, **more)


@pytest.mark.parametrize(
    "more",
    [
        {"sampling_method": "sgld"},
        {"sampling_method": "langevin", "control_variates": "on"},
        {"sampling_method": "langevin", "bounding_box_size": 0.01},
        {"sampling_method": "rmsprop_sgld", "bounding_box_size": 0.01},
        {"sampling_method": "sgnht", "epsilon": 1e-6},
        {"eval_method": "new-minibatch", "num_steps_bw_draws": 2},
        {"cores": 2, "num_chains": 5},
        {"independent_batches": True},
    ],
)
def test_chains_one_by_one_are_the_same_chains(monkeypatch, more):
    together, apart = estimates(monkeypatch, FIXED.model_copy(update=more))
    assert torch.equal(together.loss_trace, apart.loss_trace)
    assert torch.equal(together.run.positions, apart.run.positions)
    for name in (
        "distances",
        "mean_positions",
        "corrections",
        "stiff",
        "trace",
        "virial",
        "temperature",
        "at_box",
        "pairing",
    ):
        torch.testing.assert_close(
            getattr(together.run, name), getattr(apart.run, name), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )
    for name in ("cost", "twin"):
        first, second = getattr(together, name), getattr(apart, name)
        assert first.value == pytest.approx(second.value, rel=1e-3, abs=1e-5, nan_ok=True)
        assert first.error == pytest.approx(second.error, rel=1e-3, abs=1e-5, nan_ok=True)
    assert together.noise_heating == pytest.approx(apart.noise_heating, rel=1e-4, nan_ok=True)


def test_the_pilot_of_large_chains_finds_what_that_of_small_ones_does(monkeypatch):
    config = SamplerConfig(num_chains=4, num_draws=20, num_burnin_steps=20, nbeta=10.0, init_seed=3)
    together, apart = estimates(monkeypatch, config)
    assert together.tuned is not None
    assert apart.tuned is not None
    assert apart.tuned.epsilon == pytest.approx(together.tuned.epsilon, rel=1e-3)
    assert apart.tuned.noise_trace == pytest.approx(together.tuned.noise_trace, rel=1e-3)
    torch.testing.assert_close(apart.loss_trace, together.loss_trace, rtol=1e-2, atol=1e-4)


def test_a_resumed_estimate_leaves_the_one_that_it_goes_on_with_alone(monkeypatch):
    monkeypatch.setattr("icl.sampling.chains.ONE_BY_ONE", 0)
    short = FIXED.model_copy(update={"target_error": 1e-9, "max_draws": 40})
    first = estimate_llc(model(), squares, BATCHES, short)
    assert first.paused is not None
    kept = first.paused.state.position.clone()
    longer = short.model_copy(update={"max_draws": 60})
    resumed = estimate_llc(model(), squares, BATCHES, longer, resume=first)
    assert torch.equal(first.paused.state.position, kept)
    assert torch.equal(resumed.loss_trace, estimate_llc(model(), squares, BATCHES, longer).loss_trace)


def test_what_a_recorder_keeps_stays_as_it_was(monkeypatch):
    monkeypatch.setattr("icl.sampling.chains.ONE_BY_ONE", 0)
    kept = []
    config = FIXED.model_copy(update={"num_draws": 3})
    estimate_llc(model(), squares, BATCHES, config, recorders=[lambda draw, weights, chains: kept.append(weights)])
    assert len(kept) == 9
    assert not torch.equal(kept[0], kept[3])


@pytest.mark.parametrize("include", [("**",), ("0.*",)])
def test_gradients_may_be_written_over_the_weights_they_are_taken_at(include):
    objective = ModuleObjective(model(), squares, include)
    position = objective.anchor[None] + 0.1
    losses, gradients = objective.losses_and_gradients(position, INPUTS)
    again, written = objective.losses_and_gradients(position, INPUTS, out=position)
    assert torch.equal(losses, again)
    assert torch.equal(gradients, written)
    assert written.data_ptr() == position.data_ptr()


PEAK = """
import re, pathlib
from icl.sampling import SamplerConfig
from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.truth import linear_regression
model = linear_regression(1009, 0)
config = SamplerConfig(num_chains=8, num_draws={draws}, epsilon=1e-6, gamma=1.0, nbeta=100.0, init_seed=0)
estimate_llc_of(model.objective(), Inputs([model.batch]), config)
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_draws_that_stay_do_not_keep_the_memory_of_steps_from_being_used_again():
    few, many = (
        int(subprocess.run([sys.executable, "-c", PEAK.format(draws=draws)], capture_output=True, check=True).stdout)
        for draws in (100, 2500)
    )
    assert many < 1.2 * few  # it was ten times as much
