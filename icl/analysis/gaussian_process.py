"""Gaussian-process regression of a training curve, with the posterior of its slope.

A curve v(x), x = log(step + 1), gets the prior v ~ GP(0, k) with k(a, b) = A² exp(-(a - b)² / 2ℓ²) and observations
with noise of variance s_i². Hyperparameters maximise the marginal likelihood (scikit-learn's
`GaussianProcessRegressor`). Differentiation is linear, so value and slope are jointly Gaussian given the data
(Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, section 9.4):

    Cov(v(a), v'(b)) = k(a, b) (a - b) / ℓ²          Cov(v'(a), v'(b)) = k(a, b) (1/ℓ² - (a - b)²/ℓ⁴)

The defaults are the settings behind the smooth curves of arXiv 2402.02364: A² within 1e-3..1e3 from 1, ℓ within
0.5..1e3 from 3, values as they are and no noise, so that the fit nearly interpolates. For a statement about slopes,
give or fit the noise.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Kernel, WhiteKernel

Array = NDArray[np.float64]
_JITTER = 1e-10


@dataclass(frozen=True)
class CurveFit:
    """A fitted curve: the data, the hyperparameters, and the posterior they imply.

    Attributes:
        x, values: the data (N,).
        noise_variance: s_i² (N,), in squared units of the values: what was given plus what was fitted.
        amplitude: A, in units of the values.
        length_scale: ℓ, in units of x.
        offset: the constant prior mean.
        log_marginal_likelihood: of the (possibly standardised) values.
    """

    x: Array
    values: Array
    noise_variance: Array
    amplitude: float
    length_scale: float
    offset: float
    log_marginal_likelihood: float

    def mean(self, at: ArrayLike) -> Array:
        """Posterior mean of the curve at points (Q,)."""
        return self.offset + self._cross(np.asarray(at, dtype=float)) @ self._weights

    def slope(self, at: ArrayLike) -> Array:
        """Posterior mean of dv/dx at points (Q,)."""
        return self._cross_slope(np.asarray(at, dtype=float)) @ self._weights

    def std(self, at: ArrayLike) -> Array:
        """Posterior standard deviation of the curve (not of a new, noisy observation) at points (Q,)."""
        cross = self._cross(np.asarray(at, dtype=float))
        return _root(self.amplitude**2 - np.einsum("qn,nq->q", cross, cho_solve(self._factor, cross.T)))

    def slope_std(self, at: ArrayLike) -> Array:
        """Posterior standard deviation of dv/dx at points (Q,)."""
        cross = self._cross_slope(np.asarray(at, dtype=float))
        prior = (self.amplitude / self.length_scale) ** 2
        return _root(prior - np.einsum("qn,nq->q", cross, cho_solve(self._factor, cross.T)))

    def sample(self, at: ArrayLike, num: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draws of curve and slope together, each (num, Q), from the joint posterior at points (Q,)."""
        points = np.asarray(at, dtype=float)
        gap = points[:, None] - points[None, :]
        value = _rbf(gap, self.amplitude, self.length_scale)
        value_slope = value * gap / self.length_scale**2
        slope = value * (1 / self.length_scale**2 - gap**2 / self.length_scale**4)
        cross = np.concatenate((self._cross(points), self._cross_slope(points)))
        covariance = np.block([[value, value_slope], [value_slope.T, slope]]) - cross @ cho_solve(self._factor, cross.T)
        # The smooth kernel makes the covariance numerically singular, which an eigenvalue factor tolerates and Cholesky does not.
        eigenvalues, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        factor = vectors * np.sqrt(np.clip(eigenvalues, 0, None))
        draws = cross @ self._weights + rng.standard_normal((num, len(factor))) @ factor.T
        return draws[:, : points.size] + self.offset, draws[:, points.size :]

    @cached_property
    def _factor(self):
        gap = self.x[:, None] - self.x[None, :]
        gram = _rbf(gap, self.amplitude, self.length_scale)
        return cho_factor(gram + np.diag(self.noise_variance + _JITTER * max(1.0, self.amplitude**2)))

    @cached_property
    def _weights(self) -> Array:
        return cho_solve(self._factor, self.values - self.offset)

    def _cross(self, at: Array) -> Array:
        return _rbf(at[:, None] - self.x[None, :], self.amplitude, self.length_scale)

    def _cross_slope(self, at: Array) -> Array:
        gap = at[:, None] - self.x[None, :]
        return -gap / self.length_scale**2 * _rbf(gap, self.amplitude, self.length_scale)


def fit_curve(
    x: ArrayLike,
    values: ArrayLike,
    noise: Literal["none", "fit"] | ArrayLike = "none",
    *,
    standardise: bool = False,
    amplitude_bounds: tuple[float, float] = (1e-3, 1e3),
    length_scale: float = 3.0,
    length_scale_bounds: tuple[float, float] = (0.5, 1e3),
    num_restarts: int = 10,
    seed: int = 0,
) -> CurveFit:
    """Fit the hyperparameters of a curve.

    Args:
        x: (N,), such as log(step + 1).
        values: (N,).
        noise: "none" interpolates (scikit-learn's jitter of 1e-10 remains); "fit" adds one noise variance, by maximum
            likelihood; an array (N,) gives the standard error of each value, in its units.
        standardise: subtract the mean and divide by the standard deviation first. Then the amplitude's bounds are
            relative to the data and a curve's units do not matter; without it a zero mean and the absolute bounds are
            part of the prior.
        amplitude_bounds: of A² (before undoing the standardisation).
        length_scale, length_scale_bounds: start and bounds of ℓ, in units of x.
        num_restarts: further starting points of the optimiser, drawn log-uniformly within the bounds.
        seed: of those starting points.

    Raises:
        ValueError: lengths differ, fewer than three points, values that are not finite, or a negative standard error.
    """
    times, curve = np.asarray(x, dtype=float), np.asarray(values, dtype=float)
    if times.ndim != 1 or times.shape != curve.shape:
        raise ValueError(f"x and values must be vectors of one length, got {times.shape} and {curve.shape}")
    if times.size < 3 or not np.isfinite(curve).all() or not np.isfinite(times).all():
        raise ValueError("a fit needs at least three points, all of them finite")
    offset, scale = (curve.mean(), max(float(curve.std()), np.finfo(float).tiny)) if standardise else (0.0, 1.0)
    given = (
        np.zeros_like(curve) if isinstance(noise, str) else np.broadcast_to(np.asarray(noise, dtype=float), curve.shape)
    )
    if isinstance(noise, str) and noise not in ("none", "fit"):
        raise ValueError(f"noise must be 'none', 'fit' or standard errors, got {noise!r}")
    if not (given >= 0).all():
        raise ValueError("standard errors must be non-negative numbers")
    kernel = ConstantKernel(1.0, amplitude_bounds) * RBF(length_scale, length_scale_bounds)
    fitted_noise = isinstance(noise, str) and noise == "fit"
    if fitted_noise:
        kernel = kernel + WhiteKernel(1e-2 * max(1.0, float(np.var(curve / scale))), (1e-10, 1e3))
    regressor = GaussianProcessRegressor(
        kernel,
        alpha=_JITTER + (given / scale) ** 2,  # type: ignore[arg-type]
        n_restarts_optimizer=num_restarts,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # A hyperparameter at its bound is an answer here (a straight line has an endless length scale), not a failure.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regressor.fit(times[:, None], (curve - offset) / scale)
    fitted: Kernel = regressor.kernel_  # type: ignore[assignment]
    hyperparameters: dict[str, Any] = fitted.get_params()
    signal = "k1__" if fitted_noise else ""
    extra = hyperparameters["k2__noise_level"] if fitted_noise else 0.0
    return CurveFit(
        x=times,
        values=curve,
        noise_variance=given**2 + extra * scale**2,
        amplitude=float(np.sqrt(hyperparameters[f"{signal}k1__constant_value"]) * scale),
        length_scale=float(hyperparameters[f"{signal}k2__length_scale"]),
        offset=float(offset),
        log_marginal_likelihood=float(regressor.log_marginal_likelihood_value_),  # type: ignore[arg-type],
    )


def smooth_curve(
    steps: ArrayLike, values: ArrayLike, noise: Literal["none", "fit"] | ArrayLike = "none", **options
) -> pd.DataFrame:
    """A curve and its fit in x = log(step + 1), at the curve's own steps.

    Columns: `step`, `value`, `spline` (posterior mean), `spline_std`, `d_dlogt` (posterior mean of dv/dx),
    `d_dlogt_std`, and `d_dt`, the same per step, dv/d(step + 1) = (dv/dx) / (step + 1). Further options go to
    `fit_curve`.
    """
    times = np.asarray(steps, dtype=float)
    x = np.log1p(times)
    fit = fit_curve(x, values, noise, **options)
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


def _rbf(gap: Array, amplitude: float, length_scale: float) -> Array:
    return amplitude**2 * np.exp(-0.5 * (gap / length_scale) ** 2)


def _root(variance: Array) -> Array:
    return np.sqrt(np.clip(variance, 0, None))
