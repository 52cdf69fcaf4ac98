"""λ̂ over γ is the soft count of curvatures: exactly for the formulas, within errors for chains, in absolute and in relative units."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import Tensor, nn

from icl.sampling import AUTOMATIC, LLCResult, estimate_llc
from icl.sampling.objective import ModuleObjective
from icl.sampling.spectrum import bands, density, levels, soft_count
from icl.sampling.truth import linear_regression, mean_squared_error
from icl.sampling.units import units_of
from icl.streams import Stream

GAMMAS = (300.0, 10.0, 0.5)
NBETA = 40.0
CONFIG = AUTOMATIC.model_copy(
    update={"nbeta": NBETA, "num_chains": 32, "num_draws": 400, "num_burnin_steps": 200, "target_error": None}
)


def tanh_network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network that explains its data exactly, with curvatures over several decades."""
    stream = Stream(3, "spectrum")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for place, value in enumerate(model.parameters()):
        value.data = stream.normal(place, tuple(value.shape)) / 2
    inputs = stream.normal(100, (64, 3))
    return model, (inputs, model(inputs).detach())


def curvatures(model: nn.Module, batch: tuple[Tensor, Tensor], units: str = "absolute") -> np.ndarray:
    objective = ModuleObjective(model, mean_squared_error)
    point = objective.anchor.double()
    scale = units_of(point, objective.groups) if units == "relative" else torch.ones_like(point)
    twice = ModuleObjective(model.double(), mean_squared_error)
    double = (batch[0].double(), batch[1].double())
    hessian = torch.autograd.functional.hessian(lambda flat: twice.loss_at(flat, double), point)
    model.float()
    return torch.linalg.eigvalsh(scale[:, None] * hessian * scale).numpy()


@cache
def found(name: str, units: str):
    known = linear_regression(7, seed=1)
    model, batch = (known.module, known.batch) if name == "linear" else tanh_network()
    config = CONFIG.model_copy(update={"localization_units": units})

    def estimate(gamma: float) -> LLCResult:
        return estimate_llc(model, mean_squared_error, [batch], config.model_copy(update={"gamma": gamma}))

    return levels(estimate, GAMMAS), curvatures(model, batch, units)


@pytest.mark.parametrize("units", ["absolute", "relative"])
def test_chains_count_the_directions_that_the_exact_hessian_has(units):
    """A quadratic loss: equal at every γ."""
    at, exact = found("linear", units)
    assert [level.gamma for level in at] == sorted(GAMMAS, reverse=True)
    for level, count in zip(at, soft_count(exact, NBETA, [level.gamma for level in at]), strict=True):
        assert abs(level.count - count) < 4 * 2 * level.error
        assert level.error < 0.05 * level.llc


@pytest.mark.parametrize("units", ["absolute", "relative"])
def test_for_a_network_they_agree_where_the_width_is_small(units):
    """λ̂ at a finite γ sees the loss over the width 1/√γ, so the Hessian is near it at large γ only."""
    at, exact = found("tanh", units)
    tight = at[0]
    (count,) = soft_count(exact, NBETA, [tight.gamma])
    assert abs(tight.count - count) < 4 * 2 * tight.error + 0.05 * count
    assert [level.llc for level in at] == sorted(level.llc for level in at)


def test_the_difference_between_two_localisations_is_the_mean_density_between_them():
    at, exact = found("linear", "absolute")
    for band in bands(at):
        within = np.geomspace(band.low, band.high, 2001)
        mean = trapezoid(density(exact, NBETA, within), np.log(within)) / np.log(band.high / band.low)
        assert abs(band.density - mean) < 4 * band.error


def test_the_formulas():
    values = np.array([0.5, 3.0, 40.0])
    gammas = np.geomspace(1e-9, 1e12, 20001)
    count, smooth = soft_count(values, 2.0, gammas), density(values, 2.0, gammas)
    np.testing.assert_allclose(count[[0, -1]], [3, 0], atol=1e-6)  # all directions, none
    np.testing.assert_allclose(soft_count([5.0], 2.0, 10.0), 0.5)  # half of a direction at d = γ
    np.testing.assert_allclose(-np.gradient(count, np.log(gammas))[1:-1], smooth[1:-1], atol=1e-6)
    np.testing.assert_allclose(trapezoid(smooth, np.log(gammas)), 3, rtol=1e-6)  # every direction once
    spread = trapezoid(density([1.0], 1.0, gammas) * np.log(gammas) ** 2, np.log(gammas))
    np.testing.assert_allclose(spread, np.pi**2 / 3, rtol=1e-4)


def test_a_scale_of_the_loss_shifts_the_curve_in_log_gamma():
    """Why a curve is compared, and not a single γ: weights twice as large in all directions have γ four times as strong."""
    values, gammas = np.array([0.1, 2.0, 30.0]), np.geomspace(0.1, 100, 7)
    np.testing.assert_allclose(soft_count(values / 4, 1.0, gammas), soft_count(values, 1.0, 4 * gammas))


def test_a_gamma_below_a_negative_curvature_has_no_target():
    np.testing.assert_allclose(soft_count([-1.0], 2.0, 4.0), -1.0)
    with pytest.raises(ValueError, match="needs a gamma above 2"):
        soft_count([-1.0, 5.0], 2.0, [4.0, 1.0])
