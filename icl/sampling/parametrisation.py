r"""The two ways to write the constants of SGLD, and the conversion.

With n samples, temperature T = 1/β and one update  w ← w − gs ∇L − ls (w − w*) + √ns ξ:

    physical   ε, γ, nβ = n/T                gs = ε nβ / 2      ls = ε γ / 2      ns = ε
    scales     gs, ls, ns                    ε = ns             γ = 2 ls / ns     nβ = 2 gs / ns

The standard temperature is Watanabe's T = log n (Journal of Machine Learning Research 14, 2013, theorem 4).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Physical:
    """Step size ε, localisation γ and effective inverse temperature nβ."""

    epsilon: float
    gamma: float
    nbeta: float


@dataclass(frozen=True)
class Scales:
    """What multiplies the gradient, the distance from w*, and (under the root) the noise."""

    gradient_scale: float
    localization_scale: float
    noise_scale: float


def to_physical(scales: Scales) -> Physical:
    """(gs, ls, ns) -> (ε, γ, nβ).

    Raises:
        ValueError: noise_scale is not positive, so that the density targeted is undefined.
    """
    if not scales.noise_scale > 0:
        raise ValueError(f"noise_scale must be positive to define a temperature, got {scales.noise_scale}")
    return Physical(
        scales.noise_scale,
        2 * scales.localization_scale / scales.noise_scale,
        2 * scales.gradient_scale / scales.noise_scale,
    )


def standard_nbeta(num_samples: int) -> float:
    """nβ = n / log n.

    Raises:
        ValueError: fewer than 3 samples, for which log n is too small to mean anything.
    """
    if num_samples < 3:
        raise ValueError(f"nβ = n / log n needs at least 3 samples, got {num_samples}")
    return num_samples / math.log(num_samples)
