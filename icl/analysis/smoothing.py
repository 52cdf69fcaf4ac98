"""Smoothing of curves by a Gaussian filter whose width varies along the curve.

The essential dynamics of arXiv 2402.02364 moves fast at the beginning and slowly at the end, so no single width fits both.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

Array = NDArray[np.float64]

# scipy's default: the kernel ends at four standard deviations.
_TRUNCATE = 4.0
_PAD_MODES = {"reflect": "symmetric", "nearest": "edge", "mirror": "reflect", "wrap": "wrap", "constant": "constant"}


def gaussian_kernel(sigma: float) -> Array:
    """The weights exp(-j²/2σ²), j = -h..h with h = int(4σ + ½), scaled to sum to one. For σ = 0 it is a single 1."""
    if not sigma >= 0 or not np.isfinite(sigma):
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    half = int(_TRUNCATE * sigma + 0.5)
    if half == 0:
        return np.ones(1)
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    return weights / weights.sum()


def variable_gaussian_filter(values: ArrayLike, sigmas: ArrayLike, mode: str = "reflect") -> Array:
    """Element i is element i of `scipy.ndimage.gaussian_filter1d(values, sigmas[i], axis=0, mode=mode)`.

    Args:
        values: (N, ...). Each trailing coordinate is filtered separately along the first axis.
        sigmas: (N,) or a scalar: standard deviations in units of the index. 0 leaves an element unchanged.
        mode: scipy's name of the boundary rule.

    Returns:
        (N, ...).

    Raises:
        ValueError: `sigmas` and `values` differ in length, a σ is negative or not finite, or the mode does not exist.
    """
    curve = np.asarray(values, dtype=float)
    widths = np.asarray(sigmas, dtype=float)
    if mode not in _PAD_MODES:
        raise ValueError(f"mode must be one of {sorted(_PAD_MODES)}, got {mode!r}")
    if widths.ndim == 0:
        return gaussian_filter1d(curve, float(widths), axis=0, mode=mode) if widths > 0 else curve.copy()
    if curve.ndim == 0 or widths.shape != curve.shape[:1]:
        raise ValueError(f"sigmas {widths.shape} must have one entry per row of values {curve.shape}")
    if not (widths >= 0).all() or not np.isfinite(widths).all():
        raise ValueError("every sigma must be finite and at least 0")
    reach = int(_TRUNCATE * widths.max() + 0.5)
    padded = np.pad(curve, [(reach, reach)] + [(0, 0)] * (curve.ndim - 1), mode=_PAD_MODES[mode])  # type: ignore[call-overload]
    smoothed = np.empty_like(curve)
    for i, sigma in enumerate(widths):
        kernel = gaussian_kernel(sigma)
        half = kernel.size // 2
        smoothed[i] = np.tensordot(kernel, padded[reach + i - half : reach + i + half + 1], axes=1)
    return smoothed


def sigma_ramp(
    num: int,
    early: float,
    late: float,
    end: int,
    start: float = 0.2,
) -> Array:
    """Filter widths (num,): `early` up to index start·end, `late` from index `end` on, and linear in between.

    The published geometry of the essential dynamics uses early 1, late 60, end 200 on checkpoints about 100 steps apart.

    Raises:
        ValueError: a width is negative, `start` is outside [0, 1), or `end` is below 1.
    """
    if min(early, late) < 0:
        raise ValueError(f"widths must be non-negative, got {early}, {late}")
    if not 0 <= start < 1 or end < 1:
        raise ValueError(f"need 0 <= start < 1 and end >= 1, got {start}, {end}")
    u = np.clip((np.arange(num) - start * end) / ((1 - start) * end), 0, 1)
    return early + (late - early) * u


def local_scatter(values: ArrayLike, smooth: ArrayLike, reach: int) -> Array:
    """Root mean square distance (N,) of the points (N, V) from their smooth curve (N, V), over ± `reach` indices.

    It contains everything that smoothing removes: noise, and bias where the curve bends more sharply than the filter allows.
    """
    squares = ((np.asarray(values, dtype=float) - np.asarray(smooth, dtype=float)) ** 2).sum(axis=1)
    return np.sqrt(uniform_filter1d(squares, 2 * reach + 1, mode="nearest"))
