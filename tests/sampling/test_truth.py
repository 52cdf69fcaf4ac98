"""Known coefficients: formulas against each other, against quadrature, and against their limits."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad

from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.objective import ModuleObjective
from icl.sampling.presets import AUTOMATIC
from icl.sampling.truth import (
    deep_linear,
    deep_linear_coefficient,
    linear_regression,
    normal_crossing,
    normal_crossing_at,
)

sizes = st.integers(1, 13)


def reduced_rank_coefficient(inputs: int, hidden: int, outputs: int, rank: int) -> tuple[float, int]:
    """λ and multiplicity of reduced-rank regression y = B A x, written independently (Aoyagi & Watanabe 2005, theorem 1)."""
    m, h, n, r = inputs, hidden, outputs, rank
    if n + r <= m + h and m + r <= n + h and h + r <= m + n:
        odd = (m + h + n + r) % 2
        return (-((h + r) ** 2) - m * m - n * n + 2 * (h + r) * (m + n) + 2 * m * n + odd) / 8, 1 + odd
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    return m * n / 2, 1


@given(sizes, sizes, sizes, st.integers(0, 13))
def test_two_formulas_of_reduced_rank_regression_agree(inputs, hidden, outputs, rank):
    rank = min(rank, inputs, hidden, outputs)
    assert deep_linear_coefficient((inputs, hidden, outputs), rank) == reduced_rank_coefficient(
        inputs, hidden, outputs, rank
    )


@given(st.lists(sizes, min_size=2, max_size=6), st.integers(0, 13))
def test_a_coefficient_lies_between_zero_and_half_the_parameters_and_grows_with_the_rank(widths, rank):
    rank = min(rank, *widths)
    value, multiplicity = deep_linear_coefficient(widths, rank)
    parameters = sum(a * b for a, b in pairwise(widths))
    assert 0 < value <= parameters / 2
    assert multiplicity >= 1
    if rank > 0:
        assert deep_linear_coefficient(widths, rank - 1)[0] <= value * (1 + 1e-12)


def test_one_layer_is_regular_and_a_chain_of_scalars_at_zero_is_a_monomial():
    assert deep_linear_coefficient((5, 7), 3) == (35 / 2, 1)
    # w_1 ... w_L: λ = 1/2, multiplicity L.
    assert deep_linear_coefficient((1, 1, 1, 1), 0) == (0.5, 3)


def test_the_quadrature_of_a_crossing_is_scipys_and_tends_to_the_coefficient():
    nbeta, gamma = 40.0, 2.0

    def density(v: float, u: float) -> float:
        return math.exp(-nbeta * (u * v) ** 2 - gamma * (u * u + v * v) / 2)

    norm, _ = dblquad(density, 0, 8, 0, 8)
    energy, _ = dblquad(lambda v, u: nbeta * (u * v) ** 2 * density(v, u), 0, 8, 0, 8)
    assert normal_crossing_at((1, 1), 1, nbeta, gamma) == pytest.approx(energy / norm, rel=1e-6)
    errors = [0.25 - normal_crossing_at((1, 2), 1, nbeta, 1.0) for nbeta in (1e4, 1e8, 1e12)]
    assert errors[0] > errors[1] > errors[2] > 0, "multiplicity 1: a power of nbeta"
    # Multiplicity 2: λ − 1/log nβ to leading order.
    slow = 0.5 - normal_crossing_at((1, 1), 1, 1e12, 1.0)
    assert slow == pytest.approx(1 / math.log(1e12), rel=0.1)
    # Copies share nbeta and do not interact.
    assert normal_crossing((1, 1), 7).at(70.0, 2.0) == pytest.approx(7 * normal_crossing_at((1, 1), 1, 10.0, 2.0))


def test_the_fast_objective_of_linear_networks_is_the_modules():
    model = deep_linear((3, 5, 2, 7), 1, 0)
    slow = ModuleObjective(model.module, model.loss_fn)
    fast = model.objective()
    near = fast.anchor + 0.1 * torch.sin(torch.arange(2.0 * fast.anchor.numel())).reshape(2, -1)
    for mine, reference in zip(
        fast.losses_and_gradients(near, model.batch, None), slow.losses_and_gradients(near, model.batch), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)
    assert float(fast.losses(fast.anchor[None], model.batch)) == pytest.approx(0.0, abs=1e-10)


def test_a_regular_models_exact_value_is_half_its_dimension_less_the_localisations_share():
    model = linear_regression(7, 0)
    assert model.at is not None
    assert model.at(1e9, 1.0) == pytest.approx(3.5, rel=1e-6)
    assert model.at(10.0, 1.0) < 3.5


def test_the_default_estimate_of_a_small_network_is_within_its_errors_of_the_truth():
    model = deep_linear((7, 5, 11), 2, 0)
    config = AUTOMATIC.model_copy(
        update={"num_chains": 16, "num_draws": 800, "num_burnin_steps": 300, "eval_dataset_size": 2**17}
    )
    result = estimate_llc_of(model.objective(), Inputs([model.batch]), config)
    assert result.llc_ess > 100
    assert abs(result.llc_mean - model.coefficient) < 4 * result.llc_mcse + 0.03 * model.coefficient


@pytest.mark.slow
def test_two_standard_errors_cover_the_long_run_mean():
    from benchmarks.llc.standard_errors import coverage

    config = AUTOMATIC.model_copy(update={"num_draws": 1500, "num_burnin_steps": 500, "eval_dataset_size": 2**17})
    for model in (linear_regression(11, 0), deep_linear((7, 5, 11, 3), 1, 0)):
        row = coverage(model, config, repetitions=50)
        assert row["mean_within_2"] >= 0.85, row
        assert 0.7 < row["reported_over_spread"] < 1.4, row
