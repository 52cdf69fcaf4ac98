"""How long chains run, what a budget that is too small needs, and going on with it."""

from dataclasses import fields

import pytest
import torch
from linear_models import cut, half, regression
from torch import nn

from icl.sampling import AUTOMATIC, SamplerConfig, estimate_llc, langevin
from icl.sampling.budget import lengths
from icl.sampling.supply import supply_of
from icl.streams import Stream

COARSE = AUTOMATIC.model_copy(
    update={"num_draws": 40, "num_burnin_steps": 20, "num_chains": 4, "target_error": 1e-3, "max_draws": 70}
)


def larger(config: SamplerConfig, draws: int) -> SamplerConfig:
    return config.model_copy(update={"max_draws": draws})


@pytest.mark.parametrize("num_init_loss_batches", [None, 2])
@pytest.mark.parametrize("method", ["auto", "sgld", "langevin", "rmsprop_sgld", "sgnht"])
def test_an_estimate_that_is_resumed_equals_bit_for_bit_one_with_the_larger_cap(method, num_init_loss_batches):
    model, inputs, targets = regression(60, 3)
    batches = cut(inputs, targets, 20)
    given = {} if method == "auto" else {"sampling_method": method, "epsilon": 1e-4, "control_variates": "on"}
    config = COARSE.model_copy(update={**given, "num_init_loss_batches": num_init_loss_batches})
    first = estimate_llc(model, half, batches, config)
    assert first.run.losses.shape[1] == 70
    more = estimate_llc(model, half, batches, larger(config, 150), resume=first)
    whole = estimate_llc(model, half, batches, larger(config, 150))
    assert more.run.losses.shape[1] == 150
    for field in fields(whole.run):
        assert torch.equal(getattr(more.run, field.name), getattr(whole.run, field.name)) or field.name == "temperature"
    assert more.llc_mean == whole.llc_mean
    assert more.verdict == whole.verdict


def test_an_estimate_is_resumed_in_other_groups_of_chains_too():
    model, inputs, targets = regression(60, 3)
    batches = cut(inputs, targets, 20)
    first = estimate_llc(model, half, batches, COARSE)
    two = larger(COARSE, 90).model_copy(update={"cores": 2})
    more, whole = estimate_llc(model, half, batches, two, resume=first), estimate_llc(model, half, batches, two)
    assert more.llc_mean == pytest.approx(whole.llc_mean, rel=1e-4)


def test_an_estimate_is_looked_at_at_lengths_that_do_not_depend_on_the_cap():
    found = lengths(40)
    assert [next(found) for _ in range(4)] == [40, 60, 90, 135]


def test_what_cannot_be_resumed_is_refused_in_one_line():
    model, inputs, targets = regression(60, 3)
    batches = cut(inputs, targets, 20)
    first = estimate_llc(model, half, batches, COARSE)
    cases = [
        (model, batches, COARSE.model_copy(update={"num_chains": 5}), "num_chains was 4 and is 5"),
        (model, batches, larger(COARSE, 60), "larger max_draws"),
        (model, cut(inputs + 1, targets, 20), larger(COARSE, 90), "list\\(loader\\)"),
        (regression(61, 3)[0], batches, larger(COARSE, 90), "weights"),
    ]
    for other, given, config, said in cases:
        with pytest.raises(ValueError, match=said) as caught:
            estimate_llc(other, half, given, config, resume=first)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_init_loss_batches", [None, 1])
def test_progress_tells_the_estimate_so_far_and_changes_nothing(num_init_loss_batches):
    model, inputs, targets = regression(60, 3)
    told: list[tuple[float, float]] = []
    config = COARSE.model_copy(update={"target_error": None, "num_init_loss_batches": num_init_loss_batches})
    quiet = estimate_llc(model, half, [(inputs, targets)], config)
    steps: list[tuple[int, int]] = []
    result = estimate_llc(
        model,
        half,
        [(inputs, targets)],
        config,
        so_far=lambda value, error: told.append((value, error)),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(done + 1, 60) for done in range(60)]
    assert len(told) == 10
    assert told[-1] == (result.llc_mean, result.llc_mcse) == (quiet.llc_mean, quiet.llc_mcse)


def test_chains_that_are_lost_at_the_step_of_the_pilot_run_again_with_a_shorter_one():
    """The loss is flat around w* and has walls a thousand times as steep, which the pilot does not reach."""

    class Walls(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(3))

        def forward(self, inputs):
            return (inputs * self.place).square().sum(dim=1) ** 8 + self.place.square().sum()

    batch = (torch.ones(7, 3) * 2.2,)
    config = AUTOMATIC.model_copy(update={"nbeta": 10.0, "gamma": 1.0, "num_draws": 400, "num_burnin_steps": 100})
    result = estimate_llc(Walls(), lambda p, b: p(b[0]).mean(), [batch], config)
    assert result.num_lost == 0
    assert result.config.epsilon is not None
    assert result.tuned is not None
    assert result.config.epsilon <= result.tuned.epsilon


@pytest.mark.parametrize(("shuffled", "low", "high"), [(False, 1.15, 2.0), (True, 0.95, 1.1)])
def test_batches_in_turn_drive_a_direction_whose_rhythm_they_meet_and_batches_at_random_do_not(shuffled, low, high):
    """One direction, five batches with curvatures around 0.4, a step that turns it by a tenth of a circle: half of the batches' period."""
    batches = [torch.tensor([0.4 * factor]) for factor in (1.15, 1.15, 0.85, 0.85, 1.0)]
    source = supply_of(batches, independent=False, seed=0, shuffled=shuffled).source
    stream, anchor = Stream(0, "rhythm"), torch.zeros(4000, 1)
    constants = langevin.LangevinConfig(nbeta=1.0, friction=0.15)
    state = langevin.init(constants, anchor, torch.ones(4000, 1), stream.normal(0, (4000, 1)))
    squares = []
    for step in range(600):
        state = langevin.step(constants, state, source(step) * state.position, stream.normal(step + 1, (4000, 1)))
        squares.append(float(state.position.square().mean()) * 0.4)
    assert low < sum(squares[100:]) / 500 < high


def test_batches_in_turn_that_the_chain_remembers_are_seen_in_the_verdict():
    """The loss of a batch is higher where the chain has followed the others: with M batches and a chain that forgets within r steps, by
    nβ d/n · M / (M + r) of d curvatures of 1. No test of the chains sees that; here it is about 0.4 of 3."""
    model, inputs, targets = regression(1000, 5)
    config = SamplerConfig(
        num_chains=64, num_draws=800, num_burnin_steps=100, epsilon=7e-4, gamma=1.0, eval_dataset_size=1000, init_seed=0
    )
    results = [
        estimate_llc(model, half, cut(inputs, targets, 50), config.model_copy(update={"batch_order": order}))
        for order in ("in turn", "random")
    ]
    turn, random = (next(each for each in result.verdict.findings if each.name == "batch order") for result in results)
    assert (turn.outcome, random.outcome) == ("failed", "passed")
    steps, count = 2 / (7e-4 * results[0].nbeta), 20
    expected = results[0].nbeta * 5 / 1000 * count / (count + steps)
    assert abs(results[0].evidence.pairing.value - expected) < 0.2
