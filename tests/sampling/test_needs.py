"""A budget that cannot answer says what would, and what it says is true: whichever advice is followed, the estimate is right."""

import math

import pytest
from linear_models import cut, half, regression

from icl.sampling import AUTOMATIC, SamplerConfig, estimate_llc
from icl.sampling.needs import Effort, Needs, needs_of, step_of
from icl.sampling.tuning import effective_step
from icl.sampling.verdict import Finding, times_to_spread

SAMPLES, SIZE = 1000, 5
HOT = SamplerConfig(
    num_chains=24,
    num_draws=600,
    num_burnin_steps=150,
    epsilon=5e-4,
    gamma=1.0,
    eval_dataset_size=SAMPLES,
    init_seed=0,
    batch_order="random",
)


def exact(nbeta: float) -> float:
    """λ̂ of curvatures that are all about 1, at γ = 1."""
    return SIZE / 2 * nbeta / (nbeta + 1)


@pytest.fixture(scope="module")
def hot():
    """A run that batches of ten heat, with its data."""
    model, inputs, targets = regression(SAMPLES, SIZE)
    return model, inputs, targets, estimate_llc(model, half, cut(inputs, targets, 10), HOT)


def test_a_run_that_its_batches_heat_says_with_numbers_what_would_do(hot):
    *_, result = hot
    assert result.llc_mean > 1.15 * exact(result.nbeta)
    needs = result.needs
    assert needs.steps is not None
    assert needs.epsilon is not None
    assert needs.steps > 4 * 750
    assert 30 < needs.batch < 300
    assert needs.control
    assert needs.nbeta is not None
    assert needs.text in result.verdict.text
    for words in ("steps of epsilon", "batches of", "control variates", "nbeta ≤"):
        assert words in needs.text


@pytest.mark.parametrize("advice", ["batch", "control", "nbeta", pytest.param("steps", marks=pytest.mark.slow)])
def test_each_of_them_makes_it_right(hot, advice):
    model, inputs, targets, result = hot
    needs, batch, update = result.needs, 10, {}
    if advice == "batch":
        batch = int(needs.batch)
    elif advice == "control":
        update = {"control_variates": "on"}
    elif advice == "nbeta":
        update = {"nbeta": needs.nbeta, "eval_dataset_size": 1000}
    else:
        update = {"epsilon": needs.epsilon, "num_draws": needs.steps - 150}
    followed = estimate_llc(model, half, cut(inputs, targets, batch), HOT.model_copy(update=update))
    assert followed.llc_mcse < 0.1 * followed.llc_mean
    assert abs(followed.llc_mean - exact(followed.nbeta)) < 0.1 * exact(followed.nbeta) + 2 * followed.llc_mcse
    assert not followed.needs.control


def test_an_estimate_that_stops_at_its_cap_says_how_long_it_needs_and_is_right_after_that():
    model, inputs, targets = regression(SAMPLES, SIZE)
    batches = cut(inputs, targets, 10)
    config = AUTOMATIC.model_copy(update={"num_draws": 60, "num_burnin_steps": 60, "max_draws": 60})
    short = estimate_llc(model, half, batches, config)
    assert not short.verdict.trusted
    assert short.needs.steps is not None
    assert short.needs.steps > 120
    more = config.model_copy(update={"max_draws": short.needs.steps - 60})
    followed = estimate_llc(model, half, batches, more, resume=short)
    assert abs(followed.llc_mean - exact(followed.nbeta)) < 0.1 * exact(followed.nbeta) + 2 * followed.llc_mcse
    assert followed.llc_ess > short.llc_ess


EFFORT = Effort(1000, 1e-3, None, 100.0, 20, 500, False, False, plain=1.0, controlled=0.01)
FAILED = [Finding("batch noise", "failed")]


def test_needs_by_their_formulas():
    """λ̂ = 3 with 1 of it heat: y = 1/2, and 1/2 over 0.03 is 16.7."""
    needs = needs_of(EFFORT, 3.0, FAILED)
    assert needs.steps == math.ceil(1000 * 0.5 / 0.03)
    assert needs.epsilon == pytest.approx(1e-3 * 0.03 / 0.5)
    assert needs.batch == math.ceil(20 * 0.5 / 0.03)
    assert needs.control
    assert needs.nbeta == pytest.approx(100 * math.sqrt(0.03 / 0.5))
    assert needs.text == (
        "needs about 17,000 steps of epsilon 6e-05 at this batch, or batches of 340, or control variates, or nbeta ≤ 24"
    )


def test_batches_as_large_as_the_data_are_all_the_data():
    assert needs_of(EFFORT, 1.2, FAILED).batch == math.inf
    assert "all the data as one batch" in needs_of(EFFORT, 1.2, FAILED).text


def test_a_step_that_is_too_long_on_all_the_data_needs_a_shorter_one_and_nothing_is_said_of_batches():
    effort = Effort(1000, 1e-3, None, 100.0, None, 500, False, False, plain=0.0, controlled=0.0)
    needs = needs_of(effort, 3.0, [Finding("stiff directions", "failed", hot=1.25)])
    assert needs == Needs(steps=math.ceil(1000 * 0.2 / 0.03), epsilon=pytest.approx(1e-3 * 0.03 / 0.2))


def test_nothing_is_needed_where_length_and_noise_are_not_what_is_wrong():
    effort = Effort(1000, 1e-3, None, 100.0, None, 500, False, False, plain=0.0, controlled=0.0)
    assert needs_of(effort, 3.0, [Finding("minimum", "failed", "w*")]).text == ""


@pytest.mark.parametrize("friction", [0.1, 3.0, 200.0])
def test_the_step_of_an_effective_step(friction):
    epsilon = step_of(1e-3, friction)
    assert effective_step(epsilon, friction) == pytest.approx(1e-3, rel=1e-6)


def test_times_to_spread_by_the_law_of_one_direction():
    """A direction that has run for x relaxation times shows 1 − (1 − e^{−2x}) / 2x, and needs 10 / x times as many."""
    for x in (0.01, 0.3, 2.0):
        assert times_to_spread(1 + math.expm1(-2 * x) / (2 * x)) == pytest.approx(10 / x, rel=1e-3)
    assert times_to_spread(1.0) == 1.0
