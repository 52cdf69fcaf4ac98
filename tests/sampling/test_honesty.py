"""An estimate answers the question asked, or its verdict says that it does not. Linear regression with σ = 1: λ = d/2."""

import itertools
import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from icl.sampling import AUTOMATIC, SamplerConfig, estimate_llc, plan
from icl.sampling.stein import UNKNOWN, Ratio, held_share
from icl.sampling.verdict import ESS_LIMIT, Evidence, judge_ball
from icl.streams import Stream

FIXED = SamplerConfig(
    num_chains=8, num_draws=1000, num_burnin_steps=300, epsilon=1e-3, gamma=1.0, eval_dataset_size=1000, init_seed=0
)
BRIEF = FIXED.model_copy(update={"num_draws": 400, "num_burnin_steps": 200})
"""Enough for faults that change the estimate by a third or more: its standard error is a few percent."""
SHORT = AUTOMATIC.model_copy(update={"num_draws": 700, "num_burnin_steps": 300})
TINY = SamplerConfig(num_chains=2, num_draws=20, epsilon=1e-5, gamma=1.0, nbeta=10.0, init_seed=0)


def regression(size: int, dimension: int, off: float = 0.0) -> tuple[nn.Linear, Tensor, Tensor]:
    """A model at the minimum of its data, or off it, with inputs and targets."""
    stream = Stream(dimension, "test/honesty")
    inputs, weights = stream.normal(0, (size, dimension)), stream.normal(1, (dimension, 1))
    targets = inputs @ weights + stream.normal(2, (size, 1))
    model = nn.Linear(dimension, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(inputs, targets).solution.T + off
    return model, inputs, targets


def half(predict, batch) -> Tensor:
    return 0.5 * F.mse_loss(predict(batch[0]), batch[1])


def cut(inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), targets.split(size), strict=True))


@pytest.mark.parametrize(("samples", "batch"), [(1000, 10), (3000, 100), (1000, 1000)])
def test_the_default_is_right_on_mini_batches_and_takes_n_from_the_data(samples, batch):
    model, inputs, targets = regression(samples, 5)
    result = estimate_llc(model, half, DataLoader(TensorDataset(inputs, targets), batch), SHORT)
    assert result.num_samples == samples
    assert result.verdict.trusted, result.verdict.text
    assert abs(result.llc_mean - 2.5) < 2 * result.llc_mcse + 0.1 * 2.5
    assert result.config.localization == 1.0


def test_the_localisation_does_not_look_at_noise_or_budget():
    model, inputs, targets = regression(1000, 5)
    # The pilot's choice comes before the draws, so that few of them show it.
    few = SHORT.model_copy(update={"num_draws": 60, "num_burnin_steps": 30, "target_error": None})
    settings = [(10, few), (1000, few), (1000, few.model_copy(update={"num_draws": 20}))]
    found = {
        estimate_llc(model, half, cut(inputs, targets, size), config).config.localization for size, config in settings
    }
    assert found == {1.0}


def test_batches_of_unequal_size_weigh_by_their_size():
    model, inputs, targets = regression(1000, 5)
    result = estimate_llc(model, half, cut(inputs, targets, 999), SHORT)
    assert result.verdict.trusted, result.verdict.text
    assert abs(result.llc_mean - 2.5) < 2 * result.llc_mcse + 0.25


def test_the_mean_gradient_at_w_star_is_that_of_all_the_data_where_the_budget_holds_a_pass():
    model, inputs, targets = regression(300, 5, off=0.1)
    config = TINY.model_copy(update={"control_variates": "on", "num_chains": 4, "num_draws": 800})
    result = estimate_llc(model, half, DataLoader(TensorDataset(inputs, targets), batch_size=1, shuffle=True), config)
    assert result.unknown_gradient == 0.0
    half(model, (inputs, targets)).backward()
    (whole,) = (parameter.grad for parameter in model.parameters())
    away = result.run.mean_positions - torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    promised = -config.inverse_temperature / 2 * float((away @ whole.reshape(-1)).mean())
    assert result.twin.value == pytest.approx(promised, rel=1e-4)


def test_a_mean_gradient_of_too_few_samples_is_told_and_not_taken_for_a_bad_minimum():
    model, inputs, targets = regression(1000, 5)
    config = TINY.model_copy(update={"num_chains": 4, "nbeta": 1000.0, "control_variates": "on"})
    result = estimate_llc(model, half, lambda step: (inputs[step % 1000, None], targets[step % 1000, None]), config)
    assert result.unknown_gradient == 1000 / 256
    assert "mean gradient at w* is that of too few samples" in result.verdict.text
    assert "w* is not the minimum" not in result.verdict.text


def test_n_must_come_from_somewhere():
    model, inputs, targets = regression(100, 3)
    with pytest.raises(ValueError, match=r"n, the number of training samples.*eval_dataset_size=n"):
        estimate_llc(model, half, lambda step: (inputs, targets))


@pytest.mark.parametrize(
    ("settings", "batch", "said"),
    [
        ({"epsilon": 1e-2}, 1000, "too hot"),
        ({"epsilon": 2.0e-2}, 1000, "too hot"),
        ({"noise_level": 0.1}, 1000, "too cold"),
        ({"noise_level": 1.3}, 1000, "too hot"),
        ({"bounding_box_size": 0.01}, 1000, "box"),
        ({"weight_decay": 100.0}, 1000, "too hot"),
        ({"gamma": 1e5, "epsilon": 1e-6, "num_draws": 1000, "num_burnin_steps": 300}, 1000, "localisation decides"),
        ({"gamma": 1e5, "epsilon": 1e-6, "num_draws": 400, "num_chains": 8}, 1000, "localisation decides"),
        ({"sampling_method": "sgnht", "epsilon": 1e-5}, 1, "too hot"),
        ({"sampling_method": "rmsprop_sgld"}, 1, "too hot"),
        ({"sampling_method": "rmsprop_sgld", "num_draws": 1000, "num_burnin_steps": 300}, 1000, "too hot"),
        ({"num_draws": 20}, 1000, "not tested"),
    ],
)
def test_a_setting_that_does_not_sample_the_target_is_not_healthy(settings, batch, said):
    model, inputs, targets = regression(1000, 10)
    result = estimate_llc(model, half, cut(inputs, targets, batch), BRIEF.model_copy(update=settings))
    assert not result.verdict.trusted
    assert said in result.verdict.text


@pytest.mark.parametrize("off", [0.02, 0.05, 0.1])
def test_a_point_that_is_no_minimum_is_told_with_what_it_costs(off):
    model, inputs, targets = regression(1000, 10, off)
    result = estimate_llc(model, half, [(inputs, targets)], FIXED)
    assert "w* is not the minimum" in result.verdict.text
    with torch.no_grad():
        gain = half(model, (inputs, targets)) - half(regression(1000, 10)[0], (inputs, targets))
    cost = result.nbeta * float(gain)
    assert result.evidence.cost.value == pytest.approx(cost, rel=0.1)


def test_the_share_that_the_ball_holds_is_a_lower_bound_of_the_sensitivity_to_it():
    # Exact for a quadratic loss: λ̂ = ½ Σ d/(d + γ), and −dλ̂/d log γ = ½ Σ dγ/(d + γ)².
    driven, gamma, nbeta = torch.logspace(-1, 4, 30).double(), 300.0, 70.0
    mean, slope = 0.5 * (driven / (driven + gamma)).sum(), 0.5 * (driven * gamma / (driven + gamma).square()).sum()
    excess, trace = mean + torch.zeros(4, 60).double(), driven.sum() / nbeta + torch.zeros(4, 6).double()
    held = held_share(excess, trace, nbeta, gamma)
    weighted = (driven * gamma / (driven + gamma)).sum() / driven.sum()
    assert held.value == pytest.approx(float(weighted))
    assert 0 < held.value < float(slope / mean)
    assert held_share(excess, -trace, nbeta, gamma) is UNKNOWN


def test_a_share_of_the_ball_near_its_limit_is_said_to_be_near_it():
    def outcome(value: float, error: float) -> str:
        found = judge_ball(Evidence(sensitivity=Ratio(0.0, 1.0), held=Ratio(value, error)), mean=1.0)
        return found.outcome

    assert [outcome(0.9, 0.05), outcome(0.8, 0.05), outcome(0.7, 0.05), outcome(0.6, 0.05)] == [
        "failed", "not tested", "not tested", "passed",
    ]  # fmt: skip
    assert outcome(math.nan, math.nan) == "passed"


def test_sound_settings_are_healthy():
    model, inputs, targets = regression(1000, 10)
    for settings in ({}, {"sampling_method": "langevin", "epsilon": 3e-3}):
        result = estimate_llc(model, half, [(inputs, targets)], FIXED.model_copy(update=settings))
        assert result.verdict.trusted, result.verdict.text
        assert {finding.outcome for finding in result.verdict.findings} == {"passed"}


def test_control_variates_quiet_every_kernel():
    model, inputs, targets = regression(2000, 6)
    for method, epsilon in (("sgld", 2e-4), ("langevin", 2e-4), ("sgnht", 1e-4)):
        given = {"sampling_method": method, "epsilon": epsilon, "eval_dataset_size": 2000, "friction": 100.0}
        config = BRIEF.model_copy(update=given)
        plain, quiet = (
            estimate_llc(model, half, cut(inputs, targets, 16), config.model_copy(update={"control_variates": each}))
            for each in ("off", "on")
        )
        assert abs(quiet.llc_mean - 3.0) < 2 * quiet.llc_mcse + 0.3
        assert abs(plain.llc_mean - 3.0) > 0.3


def test_two_batches_that_make_up_the_data_do_not_fail_the_test_of_the_stiff_directions():
    model, inputs, targets = regression(200, 20)
    given = {"control_variates": "on", "epsilon": 1e-3, "eval_dataset_size": 200, "num_draws": 1500}
    result = estimate_llc(model, half, cut(inputs, targets, 100), FIXED.model_copy(update=given))
    assert abs(result.llc_mean - 10.0) < 2 * result.llc_mcse + 1.0
    assert abs(result.evidence.stiff.value - 1) < 2 * result.evidence.stiff.error + 0.05


def test_the_partner_of_a_test_is_any_batch_of_a_cycle():
    schedule = plan.TestSchedule(10, 0)
    met = [schedule.partner(draw, 5, 4) for draw in range(0, 400, 10)]
    assert set(met) == {0, 1, 2, 3}
    assert met == [schedule.partner(draw, 9, 4) for draw in range(0, 400, 10)]
    assert schedule.partner(3, 5, None) == 6


def test_a_target_error_goes_on_until_the_draws_are_enough_to_tell():
    model, inputs, targets = regression(1000, 40)
    config = AUTOMATIC.model_copy(update={"num_draws": 60, "num_burnin_steps": 300, "num_chains": 4, "max_draws": 1200})
    result = estimate_llc(model, half, [(inputs, targets)], config)
    assert result.llc_ess >= ESS_LIMIT
    assert 60 < result.run.losses.shape[1] < 1200


def test_parameters_that_are_frozen_stay():
    model, inputs, targets = regression(1000, 4)
    deep = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    deep[0].weight.data, deep[1].weight.data = torch.eye(4), model.weight.data.clone()
    deep[0].weight.requires_grad_(False)
    result = estimate_llc(deep, half, [(inputs, targets)], BRIEF)
    assert result.run.positions.shape[1] == 4
    assert abs(result.llc_mean - 2.0) < 4 * result.llc_mcse + 0.1
    deep[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        estimate_llc(deep, half, [(inputs, targets)], BRIEF)


def test_parameters_of_two_types_are_sampled_together():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 9).bfloat16(), nn.Linear(9, 2)

        def forward(self, inputs):
            return self.head(self.body(inputs.bfloat16()).float())

    batch = Stream(0, "two-types").normal(0, (64, 5)), Stream(0, "two-types").normal(1, (64, 2))
    assert torch.isfinite(torch.tensor(estimate_llc(Mixed(), half, [batch], TINY).llc_mean))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 9), nn.Linear(9, 2)

    def forward(self, inputs):
        return self.last(F.dropout(torch.relu(self.first(inputs)), 0.5, self.training))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, inputs):
        inputs -= 0.01
        return self.linear(inputs)


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        (Dropping(), half, "random"),
        (InPlace(), half, "changes its input"),
        (nn.Linear(5, 2), lambda p, b: half(p, b) * float("nan"), "not finite"),
        (nn.Linear(5, 2), lambda p, b: (p(b[0]) - p(b[0]).detach()).square().sum().sqrt(), "gradient of the loss at w"),
        (nn.Linear(5, 2), lambda p, b: F.mse_loss(p(b[0]), b[1], reduction="sum"), "sums over the samples"),
        (nn.Linear(5, 2), lambda p, b: (half(p, b), {}), "returned a tuple"),
        (nn.Linear(5, 2), lambda p, b: half(p, b).item(), "returned a float"),
        (nn.Linear(5, 2), lambda p, b: b[0].mean(), "predict"),
        (nn.Linear(7, 2), half, "fails on the first batch"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_any_sampling(model, loss, said):
    torch.manual_seed(0)
    batch = Stream(0, "refused").normal(0, (64, 5)), Stream(0, "refused").normal(1, (64, 2))
    steps: list[int] = []
    with pytest.raises(ValueError, match=said) as caught:
        estimate_llc(model, loss, [batch], TINY, progress=lambda done, total: steps.append(done))
    assert steps == []
    assert "\n" not in str(caught.value)


Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass
class Record:
    inputs: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize("kind", [Pair, Record])
def test_a_sum_over_samples_is_noticed_in_batches_with_named_fields(kind):
    batch = kind(Stream(0, "refused").normal(0, (64, 5)), Stream(0, "refused").normal(1, (64, 2)))
    with pytest.raises(ValueError, match="sums over the samples"):
        estimate_llc(nn.Linear(5, 2), lambda p, b: F.mse_loss(p(b.inputs), b.labels, reduction="sum"), [batch], TINY)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ({"x": torch.zeros(8, 5)}, "one batch"),
        ([], "empty"),
        (lambda: iter([]), "step -> batch"),
        (lambda step: iter([step]), "iterator"),
    ],
)
def test_batches_that_are_none_are_refused(batches, said):
    with pytest.raises(ValueError, match=said):
        estimate_llc(nn.Linear(5, 2), half, batches, TINY)


def test_losses_whose_number_depends_on_the_batch_are_refused():
    model, inputs, targets = regression(1000, 5)
    with pytest.raises(ValueError, match="300 losses for one batch and 100"):
        estimate_llc(model, lambda p, b: 0.5 * (p(b[0]) - b[1]).square()[:, 0], cut(inputs, targets, 300), SHORT)


def test_an_endless_iterable_is_read_as_far_as_it_is_needed():
    def stream():
        for step in itertools.count():
            assert step < 1000
            yield Stream(0, "endless").normal(step, (8, 5)), torch.zeros(8, 2)

    assert torch.isfinite(torch.tensor(estimate_llc(nn.Linear(5, 2), half, stream(), TINY).llc_mean))
