"""Gaussian-process regression of a training curve, with the posterior of its slope.

A curve v(x), x = log(step + 1), has the prior v ~ c + GP(0, A² ρ(|a - b| / ℓ)). It is observed with independent noise of
variance s_i² + σ₀². The s_i are known standard errors. σ₀ is unknown and the same for all points: neighbouring checkpoints
differ by more than their standard errors. A, ℓ and σ₀ maximise the marginal likelihood. Differentiation is linear, so value
and slope are jointly Gaussian given the data (Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006,
chapter 2 and section 9.4). With k(r) = A² ρ(r/ℓ), r = a - b:

    Cov(v(a), v(b)) = k(r)        Cov(v'(a), v(b)) = k'(r)        Cov(v'(a), v'(b)) = -k''(r)

There are two correlations ρ. Curves under "matern52" are twice differentiable; those under "rbf" are analytic. Analytic
curves are rigid: a sharp bend at one place makes the fit swing at others, and the swings look like significant slopes. So
statements about slopes use "matern52", the default.

Shapes: N points, Q places at which the fit is evaluated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

Array = NDArray[np.float64]
Correlation = Literal["matern52", "rbf"]
_JITTER = 1e-10
_NOISE_BOUNDS = (1e-10, 10.0)  # of σ₀², relative to the variance of the data


@dataclass(frozen=True)
class CurvePrior:
    """The prior of a curve.

    Attributes:
        correlation: ρ.
        fit_noise: whether there is a common noise σ₀ in addition to the known standard errors.
        standardise: whether c is the data's mean and bounds are relative to their standard deviation, so that the fit does
            not depend on a curve's units. Otherwise c = 0, and bounds are absolute.
        amplitude_bounds: bounds of A².
        length_scale_bounds: bounds of ℓ, in units of x. None: from the median spacing of the data, below which nothing can
            be resolved, to ten times their range, above which every curve is a straight line.
    """

    correlation: Correlation = "matern52"
    fit_noise: bool = True
    standardise: bool = True
    amplitude_bounds: tuple[float, float] = (1e-3, 1e3)
    length_scale_bounds: tuple[float, float] | None = None


PUBLISHED_PRIOR = CurvePrior("rbf", fit_noise=False, standardise=False, length_scale_bounds=(0.5, 1e3))
"""The settings of the smooth curves in arXiv 2402.02364. Without noise, the fit interpolates the data, up to a jitter."""


@dataclass(frozen=True)
class CurveFit:
    """A fitted curve: the data, the hyperparameters, and the resulting posterior.

    Attributes:
        x, values: the data (N,).
        noise_variance: s_i² + σ₀² (N,), in squared units of the values.
        amplitude: A, in units of the values.
        length_scale: ℓ, in units of x.
        offset: c.
        correlation: ρ.
        log_marginal_likelihood: log density of the values.
    """

    x: Array
    values: Array
    noise_variance: Array
    amplitude: float
    length_scale: float
    offset: float
    correlation: Correlation
    log_marginal_likelihood: float

    def mean(self, at: ArrayLike) -> Array:
        """Posterior mean of the curve at points (Q,)."""
        return self.offset + self._covariance(at, self.x)[0] @ self._weights

    def slope(self, at: ArrayLike) -> Array:
        """Posterior mean of dv/dx at points (Q,)."""
        return self._covariance(at, self.x)[1] @ self._weights

    def std(self, at: ArrayLike) -> Array:
        """Posterior standard deviation of the curve (not of a new, noisy observation) at points (Q,)."""
        return self._posterior_std(self._covariance(at, self.x)[0], self._covariance(0.0, 0.0)[0].item())

    def slope_std(self, at: ArrayLike) -> Array:
        """Posterior standard deviation of dv/dx at points (Q,)."""
        return self._posterior_std(self._covariance(at, self.x)[1], -self._covariance(0.0, 0.0)[2].item())

    def sample(self, at: ArrayLike, num: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draws of curve and slope together, each (num, Q), from the joint posterior at points (Q,)."""
        points = np.asarray(at, dtype=float)
        value, first, second = self._covariance(points, points)
        cross = np.concatenate(self._covariance(points, self.x)[:2])
        covariance = np.block([[value, first.T], [first, -second]]) - cross @ cho_solve(self._factor, cross.T)
        # Close points make the covariance numerically singular. An eigenvalue decomposition can handle that, Cholesky cannot.
        eigenvalues, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        factor = vectors * np.sqrt(np.clip(eigenvalues, 0, None))
        draws = cross @ self._weights + rng.standard_normal((num, len(factor))) @ factor.T
        return draws[:, : points.size] + self.offset, draws[:, points.size :]

    @cached_property
    def _factor(self):
        gram = self._covariance(self.x, self.x)[0]
        return cho_factor(gram + np.diag(self.noise_variance + _JITTER * self.amplitude**2))

    @cached_property
    def _weights(self) -> Array:
        return cho_solve(self._factor, self.values - self.offset)

    def _covariance(self, a: ArrayLike, b: ArrayLike) -> tuple[Array, Array, Array]:
        """k, k' and k'' at a_i - b_j, each (len(a), len(b))."""
        gap = np.atleast_1d(np.asarray(a, dtype=float))[:, None] - np.atleast_1d(np.asarray(b, dtype=float))[None, :]
        value, first, second = _CORRELATIONS[self.correlation](gap / self.length_scale)
        scale = self.amplitude**2
        return scale * value, scale / self.length_scale * first, scale / self.length_scale**2 * second

    def _posterior_std(self, cross: Array, prior: float) -> Array:
        return np.sqrt(np.clip(prior - np.einsum("qn,nq->q", cross, cho_solve(self._factor, cross.T)), 0, None))


def fit_curve(
    x: ArrayLike, values: ArrayLike, std_errors: ArrayLike = 0.0, prior: CurvePrior | None = None
) -> CurveFit:
    """Fit the hyperparameters of a curve by maximum marginal likelihood.

    The likelihood has several maxima, such as a wiggly curve with little noise and a smooth one with more. So it is computed
    on a grid within the bounds, and the best grid points are refined by the simplex method, which is robust to rounding.

    Args:
        x: (N,), such as log(step + 1), in any order.
        values: (N,).
        std_errors: (N,) or one number: the known standard errors s_i, in units of the values.
        prior: by default `CurvePrior()`.

    Raises:
        ValueError: lengths differ, there are fewer than three points, numbers are not finite, or a standard error is
            negative.
    """
    times, curve = np.asarray(x, dtype=float), np.asarray(values, dtype=float)
    if times.ndim != 1 or times.shape != curve.shape:
        raise ValueError(f"x and values must be vectors of one length, got {times.shape} and {curve.shape}")
    if times.size < 3 or not np.isfinite(curve).all() or not np.isfinite(times).all():
        raise ValueError("a fit needs at least three points, all of them finite; drop the others first")
    errors = np.broadcast_to(np.asarray(std_errors, dtype=float), curve.shape)
    if not (errors >= 0).all() or not np.isfinite(errors).all():
        raise ValueError("standard errors must be finite and not negative")
    chosen = prior or CurvePrior()
    offset, scale = (float(curve.mean()), float(curve.std()) or 1.0) if chosen.standardise else (0.0, 1.0)
    bounds = [chosen.amplitude_bounds, chosen.length_scale_bounds or _resolved_lengths(times)]
    bounds += [_NOISE_BOUNDS] if chosen.fit_noise else []
    gap, known, targets = times[:, None] - times[None, :], (errors / scale) ** 2, (curve - offset) / scale
    correlation = _CORRELATIONS[chosen.correlation]

    def negative_log_likelihood(logs: Array) -> float:
        square, length, *common = np.exp(logs)
        gram = square * correlation(gap / length)[0]
        gram[np.diag_indices_from(gram)] += known + sum(common) + _JITTER * square
        try:
            factor = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            return float("inf")
        whitened = solve_triangular(factor, targets, lower=True)
        constant = np.log(2 * np.pi) / 2 * targets.size
        return float(whitened @ whitened / 2 + np.log(np.diag(factor)).sum() + constant)

    best = _minimise(negative_log_likelihood, np.log(bounds))
    square, length, *common = np.exp(best)
    return CurveFit(
        x=times,
        values=curve,
        noise_variance=(known + sum(common)) * scale**2,
        amplitude=float(np.sqrt(square) * scale),
        length_scale=float(length),
        offset=offset,
        correlation=chosen.correlation,
        log_marginal_likelihood=-negative_log_likelihood(best) - curve.size * float(np.log(scale)),
    )


def smooth_curve(
    steps: ArrayLike, values: ArrayLike, std_errors: ArrayLike = 0.0, prior: CurvePrior | None = None
) -> pd.DataFrame:
    """A curve and its fit in x = log(step + 1), at the curve's own steps; see `fit_curve`.

    Columns: `step`, `value`, `spline` (posterior mean), `spline_std`, `d_dlogt` (posterior mean of dv/dx),
    `d_dlogt_std`, and `d_dt`, the same per step, dv/d(step + 1) = (dv/dx) / (step + 1).
    """
    times = np.asarray(steps, dtype=float)
    x = np.log1p(times)
    fit = fit_curve(x, values, std_errors, prior)
    slope = fit.slope(x)
    return pd.DataFrame(
        {
            "step": np.asarray(steps),
            "value": fit.values,
            "spline": fit.mean(x),
            "spline_std": fit.std(x),
            "d_dlogt": slope,
            "d_dlogt_std": fit.slope_std(x),
            "d_dt": slope / (times + 1),
        }
    )


def _resolved_lengths(x: Array) -> tuple[float, float]:
    gaps = np.diff(np.unique(x))
    return (float(np.median(gaps)), 10 * float(np.ptp(x))) if gaps.size else (0.1, 10.0)


def _minimise(function: Callable[[Array], float], bounds: Array) -> Array:
    """The minimum over a box (n, 2), searched from the two best points of a grid."""
    axes = [np.linspace(low, high, num) for (low, high), num in zip(bounds, (5, 8, 5), strict=False)]
    starts = sorted((np.array(point) for point in product(*axes)), key=function)[:2]
    # The simplex extends half a grid cell towards the middle of the box.
    spans = np.diag([(axis[1] - axis[0]) / 2 for axis in axes])
    found = []
    for start in starts:
        simplex = np.vstack((start, start + np.where(start > bounds.mean(axis=1), -1, 1)[:, None] * spans))
        options = {"initial_simplex": simplex, "xatol": 1e-2, "fatol": 1e-4}
        found.append(minimize(function, start, method="Nelder-Mead", bounds=bounds, options=options))
    return min(found, key=lambda result: result.fun).x


def _matern52(u: Array) -> tuple[Array, Array, Array]:
    """ρ(u) = (1 + z + z²/3) e^-z, z = √5 |u|, with its first two derivatives in u."""
    z = np.sqrt(5.0) * np.abs(u)
    decay = np.exp(-z)
    first = -np.sqrt(5.0) / 3 * np.sign(u) * z * (1 + z) * decay
    return (1 + z + z**2 / 3) * decay, first, 5 / 3 * (z**2 - z - 1) * decay


def _rbf(u: Array) -> tuple[Array, Array, Array]:
    """ρ(u) = exp(-u²/2), with its first two derivatives in u."""
    value = np.exp(-0.5 * u**2)
    return value, -u * value, (u**2 - 1) * value


_CORRELATIONS: Mapping[Correlation, Callable[[Array], tuple[Array, Array, Array]]] = MappingProxyType(
    {"matern52": _matern52, "rbf": _rbf}
)
