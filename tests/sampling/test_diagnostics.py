"""Diagnostics on processes whose autocorrelation is known."""

import math

import pytest
import torch

from icl.sampling.diagnostics import bulk_ess, mcse_of_mean, split_rhat
from icl.streams import Stream


def autoregressive(chains: int, draws: int, correlation: float, seed: int = 0) -> torch.Tensor:
    """Stationary AR(1) chains of unit variance: autocorrelation time (1 + ρ)/(1 − ρ)."""
    noise = Stream(seed, "test/ar").normal(0, (draws, chains)).double()
    values = [noise[0]]
    for innovation in noise[1:]:
        values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * innovation)
    return torch.stack(values, dim=1)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregressive_process(correlation):
    draws = autoregressive(7, 5003, correlation)
    expected = draws.numel() * (1 - correlation) / (1 + correlation)
    assert bulk_ess(draws) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize(("chains", "correlation"), [(8, 0.9), (4, 0.5), (4, -0.7), (2, 0.9), (1, 0.5)])
def test_two_standard_errors_cover_the_mean_as_often_as_they_should(chains, correlation):
    repetitions = 400
    draws = autoregressive(chains * repetitions, 600, correlation).reshape(repetitions, chains, 600)
    covered = [abs(float(each.mean())) < 2 * mcse_of_mean(each) for each in draws]
    assert 0.90 <= sum(covered) / repetitions <= 0.98


def test_antithetic_draws_count_for_more_than_themselves():
    assert bulk_ess(autoregressive(5, 3001, -0.5)) > 2 * 15005


def test_rhat_is_one_for_chains_that_agree_and_large_for_chains_that_do_not():
    draws = autoregressive(5, 2003, 0.3)
    assert split_rhat(draws) == pytest.approx(1.0, abs=0.01)
    shifted = draws + torch.arange(5)[:, None]
    assert split_rhat(shifted) > 1.5
    # A drift within every chain shows because chains are split; a difference of scale because draws are folded.
    assert split_rhat(draws + torch.linspace(0, 3, 2003)) > 1.2
    assert split_rhat(draws * torch.tensor([1.0, 1.0, 1.0, 1.0, 6.0])[:, None]) > 1.1


def test_rhat_of_two_constant_halves_by_hand():
    # Ranks of 1..8 in one chain: halves {1..4}, {5..8} in normal scores z.
    z = torch.special.ndtri((torch.arange(1, 9, dtype=torch.float64) - 0.375) / 8.25).reshape(2, 4)
    within, between = z.var(dim=1).mean(), z.mean(dim=1).var()
    assert split_rhat(torch.arange(8.0)[None]) == pytest.approx(math.sqrt(3 / 4 + float(between / within)))


def test_invariance_under_monotone_maps_for_bulk_and_under_shifts_for_the_mean():
    draws = autoregressive(3, 1009, 0.6)
    assert bulk_ess(draws.exp()) == pytest.approx(bulk_ess(draws))
    assert mcse_of_mean(7 + 3 * draws) == pytest.approx(3 * mcse_of_mean(draws))


def test_degenerate_draws():
    assert mcse_of_mean(torch.ones(3, 17)) == 0.0
    assert math.isnan(split_rhat(torch.ones(3, 17)))
    assert math.isnan(split_rhat(torch.ones(1, 3)))
    assert math.isnan(bulk_ess(torch.ones(3, 17)))
