import subprocess
import sys

import pytest
import torch

from icl.analysis.hessian import exact_hessian, regression_loss
from icl.checkpoints import Checkpoints
from icl.estimation import (
    LLCConfig,
    MadeAhead,
    checkpoints_at_once,
    estimate_at_checkpoint,
    estimate_at_checkpoints,
    estimate_over_run,
    hessian_at_checkpoint,
)
from icl.model import InContextRegressionTransformer, initial_parameters, unflatten
from icl.sampling.transformer_objective import TransformerObjective
from icl.settings import ConfigError
from icl.storage import LocalStore
from icl.streams import Stream
from icl.tasks import RegressionTask

TASK = {
    **{"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 2, "num_layers": 1},
    **{"num_tasks": "inf", "model_seed": 7, "pretrain_seed": None, "true_seed": None, "sampling_seed": None},
}
SAMPLER = {"epsilon": 1e-4, "gamma": 1.0, "nbeta": 10.0, "num_chains": 2, "num_draws": 3, "grad_batch_size": 11}
PRESENT = [0, 1, 7, 30, 59]


def config_with(**others) -> LLCConfig:
    return LLCConfig.parse(
        {"task_config": TASK, "sampler_config": {**SAMPLER, "init_seed": 5}, "num_steps": 60, **others}
    )


@pytest.mark.parametrize(
    ("choice", "steps"),
    [
        ({}, PRESENT),
        ({"step": 6}, [7]),
        ({"checkpoint_idx": -1}, [59]),
        ({"steps": [0, 28, 33, 59]}, [0, 30, 59]),
        ({"steps": [0, 28, 59], "testing": True}, [0, 59]),
    ],
)
def test_the_checkpoints_that_a_sweep_chooses(choice, steps):
    assert config_with(**choice).chosen_steps(PRESENT) == steps


def test_a_choice_that_cannot_be_met_says_why():
    with pytest.raises(ConfigError, match="train it first"):
        config_with().chosen_steps([])
    with pytest.raises(ConfigError, match="the run has 5 checkpoints"):
        config_with(checkpoint_idx=5).chosen_steps(PRESENT)
    with pytest.raises(ConfigError, match="has checkpoints up to step 30 only; train it on"):
        config_with(steps=[0, 31]).chosen_steps(PRESENT[:-1])
    assert config_with(step=10**6).chosen_steps(PRESENT) == [59]
    with pytest.raises(ConfigError, match="step and checkpoint_idx both choose"):
        config_with(step=1, checkpoint_idx=1)


def test_the_hessian_metric_is_the_exact_hessian_of_the_first_sequences():
    config = config_with(sampler_config={**SAMPLER, "init_seed": 5, "num_evals": 2, "eval_metrics": ["hessian"]})
    shape = config.task_config.shape
    weights = dict(unflatten(shape, initial_parameters_of(config)))
    row = hessian_at_checkpoint(config, weights)
    law = config.task_config.resolved().pretrain_task()
    xs, ys = law.sample(Stream(5, "sampling").child("dataset"), 0, 11)
    model = InContextRegressionTransformer.from_shape(shape, seed=0)
    model.load_state_dict(weights)
    eigenvalues = torch.linalg.eigvalsh(exact_hessian(*regression_loss(model, xs, ys)))
    by_size = eigenvalues[eigenvalues.abs().argsort(descending=True)]
    assert row["hessian/evals/0"] == pytest.approx(float(by_size[0]), rel=1e-3)
    assert row["hessian/evals/1"] == pytest.approx(float(by_size[1]), rel=1e-2)
    assert abs(row["hessian/trace"] - float(eigenvalues.sum())) < 6 * row["hessian/trace_std_error"] + 1e-6


def initial_parameters_of(config: LLCConfig) -> torch.Tensor:
    from icl.model import flatten

    return flatten(initial_parameters(config.task_config.shape, 7))


def test_an_estimate_that_is_cut_short_is_not_recorded(tmp_path):
    config = config_with()
    checkpoints = Checkpoints(LocalStore(tmp_path), config.name)
    weights = dict(unflatten(config.task_config.shape, initial_parameters_of(config)))
    for step in (0, 1, 7):
        checkpoints.save(step, weights)
    recorded, calls = [], []

    def count(done: int, total: int) -> None:
        calls.append((done, total))

    left = estimate_over_run(
        config,
        checkpoints,
        [0],
        lambda step, result: recorded.append(step),
        progress=count,
        should_stop=lambda: bool(recorded),
    )
    assert (left, recorded) == (1, [1])
    assert all(0 <= done <= total for done, total in calls)
    assert calls


def weights_of_seeds(config: LLCConfig, *seeds: int) -> list[dict[str, torch.Tensor]]:
    return [dict(initial_parameters(config.task_config.shape, seed)) for seed in seeds]


@pytest.fixture
def vectorised(monkeypatch):
    """Chains run as on an accelerator: as one tensor, by PyTorch."""
    make = TransformerObjective.__init__

    def make_vectorised(self, *arguments):
        make(self, *arguments)
        self._one_by_one = False

    monkeypatch.setattr(TransformerObjective, "__init__", make_vectorised)


@pytest.mark.parametrize(
    "choice",
    [
        {"grad_batch_origin": "eval-dataset", "eval_dataset_size": 40},
        {"num_init_loss_batches": 3},
        {"eval_method": "new-minibatch"},
        {"eval_method": "dataset", "eval_dataset_size": 30, "sampling_method": "sgnht"},
        {"eval_loss_fn": "subsequence-mse"},
    ],
    ids=lambda choice: next(iter(choice)),
)
@pytest.mark.parametrize("way", ["one by one", "as one tensor"])
def test_checkpoints_that_share_a_batch_have_the_estimates_that_they_have_alone(choice, way, request):
    if way == "as one tensor":
        request.getfixturevalue("vectorised")
    config = config_with(sampler_config={**SAMPLER, "init_seed": 5, **choice})
    weights = weights_of_seeds(config, 1, 2, 3)
    together = estimate_at_checkpoints(config, weights)
    assert len({result.llc_mean for result in together}) == 3
    for result, each in zip(together, weights, strict=True):
        alone = estimate_at_checkpoint(config, each)
        torch.testing.assert_close(result.token_loss_trace, alone.token_loss_trace, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.distances, alone.distances, rtol=1e-4, atol=1e-6)
        assert result.llc_mean == pytest.approx(alone.llc_mean, rel=1e-4, abs=1e-4)
        assert result.noise_heating == pytest.approx(alone.noise_heating, rel=1e-3, nan_ok=True)


def test_a_run_whose_checkpoints_share_batches_gives_the_same_rows(tmp_path, monkeypatch, vectorised):
    config = config_with()
    checkpoints = Checkpoints(LocalStore(tmp_path), config.name)
    for step, weights in zip((0, 1, 7), weights_of_seeds(config, 1, 2, 3), strict=True):
        checkpoints.save(step, weights)

    def rows_of(at_once: int) -> tuple[dict, list]:
        monkeypatch.setattr("icl.estimation.checkpoints_at_once", lambda config, device: at_once)
        rows, calls = {}, []
        left = estimate_over_run(
            config, checkpoints, [], lambda step, result: rows.update({step: result.summary()}),
            progress=lambda done, total: calls.append(done / total),
        )  # fmt: skip
        assert left == 0
        return rows, calls

    alone, _ = rows_of(1)
    together, progress = rows_of(2)
    assert list(together) == list(alone) == [0, 1, 7]
    assert all(together[step]["llc/mean"] == pytest.approx(alone[step]["llc/mean"], rel=1e-4) for step in alone)
    assert progress == sorted(progress)
    assert progress[-1] == 1


def test_only_an_accelerator_and_settings_that_record_losses_alone_share_a_batch(vectorised):
    sampler = {**SAMPLER, "init_seed": 5}
    assert checkpoints_at_once(config_with(), "cpu") == 1
    fitting = [
        checkpoints_at_once(config_with(sampler_config={**sampler, "max_memory_bytes": size}), "meta")
        for size in (1, 10**6, 10**7)
    ]
    assert fitting[0] == 1 < fitting[1] < fitting[2]
    for alone in (
        {"eval_metrics": ["weights"]},
        {"include": ["unembedding.**"]},
        {"epsilon": None},
        {"independent_batches": True},
    ):
        config = config_with(sampler_config={**sampler, "max_memory_bytes": 10**7, **alone})
        assert checkpoints_at_once(config, "meta") == 1
    with pytest.raises(ValueError, match="cannot share a batch"):
        estimate_at_checkpoints(config, weights_of_seeds(config, 1, 2))


MEMORY = """
import resource, sys
import torch
from icl.evals import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import SamplerConfig
from icl.sampling.chains import chains_that_fit
from icl.sampling.transformer_objective import make_objective
from icl.streams import Stream
from icl.tasks import RegressionTask
torch.set_num_threads(1)
bound, size = 400 * 2**20, 128
objective = make_objective(InContextRegressionTransformer(4, 8, 64, 64, 4, 2, seed=0), mse_loss, SamplerConfig())
objective._one_by_one = False
batch = RegressionTask(4, 8, 0.125).sample(Stream(0, "memory"), 0, size)
chains = chains_that_fit(SamplerConfig(max_memory_bytes=bound), objective, batch)
objective.losses_and_gradients(objective.anchor.expand(1, -1).clone(), batch)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
objective.losses_and_gradients(objective.anchor.expand(chains, -1).clone(), batch)
print(chains, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / bound)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is counted in other units elsewhere")
def test_chains_of_one_group_take_no_more_memory_than_the_bound():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    chains, share = done.stdout.split()
    assert int(chains) > 2
    assert 0.2 < float(share) < 1.0


def test_batches_made_ahead_are_those_made_one_by_one():
    law, stream = RegressionTask(3, 4, 0.5, num_tasks=7), Stream(3, "ahead")
    ahead = MadeAhead(law, stream, 5, torch.device("cpu"))
    for step in (0, 1, 999, 1000, 2500, 3):
        assert all(torch.equal(*pair) for pair in zip(ahead(step), law.sample(stream, step, 5), strict=True))
