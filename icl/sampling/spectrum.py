r"""λ̂ as a function of the localisation γ: a soft count of the curvatures of the loss.

Let the loss be quadratic around w*, with curvatures h_i in the units in which γ pulls, and d_i = nβ h_i. The sampler's target is then
Gaussian with precision d_i + γ along direction i, and the estimate is

    λ̂(γ) = nβ (E[L] − L(w*)) = ½ Σ_i d_i / (d_i + γ).

With σ(x) = 1 / (1 + e^{−x}),

    2 λ̂(γ) = Σ_i σ(log d_i − log γ)                  directions with d_i above γ, each counted softly,
    −2 dλ̂ / d log γ = Σ_i σ'(log d_i − log γ)         directions per unit of log d at d = γ, smoothed.

The smoothing kernel σ' has integral 1 and standard deviation π/√3, a factor of 6 in d. So λ̂ at one γ depends on the model and on γ; its
whole curve is the model's spectrum at that resolution. Directions with d_i < 0 count as less than nothing, and the target exists
for γ > −d_i only.

Where the loss is not quadratic, both lines define an effective spectrum. It is that of the region around w* of width 1/√γ.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot, log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icl.sampling.result import LLCResult


@dataclass(frozen=True)
class Level:
    """The estimate at one localisation.

    Attributes:
        gamma: γ.
        llc: λ̂(γ).
        error: its Monte-Carlo standard error.
        verdict: whether to trust it ("healthy", or what is wrong).
    """

    gamma: float
    llc: float
    error: float
    verdict: str

    @property
    def count(self) -> float:
        """2 λ̂, the number of directions with nβ times curvature above γ; its standard error is 2 `error`."""
        return 2 * self.llc


@dataclass(frozen=True)
class Band:
    """The directions between two localisations.

    Attributes:
        low, high: the two γ.
        density: directions per unit of log d, the mean over the band.
        error: its standard error, the two estimates taken as independent.
    """

    low: float
    high: float
    density: float
    error: float


def levels(estimate: Callable[[float], LLCResult], gammas: Iterable[float]) -> tuple[Level, ...]:
    """The estimates at several localisations, in descending order of γ.

    Every estimate starts at w*. Chains that went on from a larger γ would save little: along a flat direction the variance has to grow to
    1/γ, and relaxes at the same rate from the smaller value as from 0.

    Args:
        estimate: γ -> the estimate, such as `lambda gamma: estimate_llc(model, loss, data, config.model_copy(update={"gamma": gamma}))`.
        gammas: values of γ.
    """
    found = ((gamma, estimate(gamma)) for gamma in sorted(gammas, reverse=True))
    return tuple(Level(gamma, result.llc_mean, result.llc_mcse, result.verdict.text) for gamma, result in found)


def bands(found: Sequence[Level]) -> tuple[Band, ...]:
    """−2 Δλ̂ / Δ log γ between neighbouring localisations."""
    ordered = sorted(found, key=lambda level: level.gamma)
    return tuple(
        Band(
            low.gamma,
            high.gamma,
            (low.count - high.count) / log(high.gamma / low.gamma),
            2 * hypot(low.error, high.error) / log(high.gamma / low.gamma),
        )
        for low, high in pairwise(ordered)
    )


def soft_count(curvatures: ArrayLike, nbeta: float, gammas: ArrayLike) -> NDArray[np.float64]:
    """Σ_i d_i / (d_i + γ) for each γ, from curvatures h_i: what 2 λ̂(γ) is for a quadratic loss.

    Raises:
        ValueError: γ is not above −d_i for all i, so there is no target density.
    """
    scaled, at = _scaled(curvatures, nbeta, gammas)
    return (scaled / (scaled + at)).sum(axis=-1)


def density(curvatures: ArrayLike, nbeta: float, gammas: ArrayLike) -> NDArray[np.float64]:
    """Σ_i d_i γ / (d_i + γ)² for each γ, from curvatures h_i: what −2 dλ̂/d log γ is for a quadratic loss.

    Raises:
        ValueError: as `soft_count`.
    """
    scaled, at = _scaled(curvatures, nbeta, gammas)
    return (scaled * at / (scaled + at) ** 2).sum(axis=-1)


def _scaled(curvatures: ArrayLike, nbeta: float, gammas: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """d (N,), and γ with a last axis of one."""
    scaled = nbeta * np.asarray(curvatures, dtype=np.float64).reshape(-1)
    at = np.asarray(gammas, dtype=np.float64)[..., None]
    if scaled.size and not (at + scaled.min() > 0).all():
        raise ValueError(
            f"the curvature {scaled.min() / nbeta:.3g} is negative and needs a gamma above {-scaled.min():.3g}; give larger gammas"
        )
    return scaled, at
