"""Differential geometry of a trajectory in planes: osculating circles, evolutes, vertices and forms.

In a plane of two principal components, the trajectory γ(t) of the essential dynamics (arXiv 2402.02364) is a plane curve.
Its osculating circle at t has curvature κ = (γ' × γ'') / |γ'|³ and centre γ + n/κ, where n is the unit normal. The centres
form the evolute. A vertex is a point at which κ is stationary. There the evolute has a cusp, and the centre stands still:
the trajectory turns around one point. A *form* is a function that is such a point in every plane at the same time. Training
turns around it without reaching it.

Shapes: N points of a trajectory, V principal components.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import median_filter

Array = NDArray[np.float64]

MIN_MOTION = 2.0
"""How far the trajectory must extend around a form, in units of the scatter of its points."""


@dataclass(frozen=True)
class OsculatingCircles:
    """The osculating circles of a plane curve.

    Attributes:
        index: (n,) indices of the curve's points that have a circle: all but the first and the last.
        curvature: (n,) signed κ, positive where the curve turns left, in 1 / unit of length.
        radius: (n,) 1 / |κ|, infinite on straight pieces.
        centre: (n, 2), the evolute; infinite or NaN where the radius is.
    """

    index: NDArray[np.int64]
    curvature: Array
    radius: Array
    centre: Array


def osculating_circles(curve: ArrayLike) -> OsculatingCircles:
    """Osculating circles of a plane curve (N, 2) by central differences in its own parameter.

    γ' = (γ_{t+1} - γ_{t-1}) / 2, γ'' = γ_{t+1} - 2γ_t + γ_{t-1}. The curvature does not depend on the parametrisation. So
    uneven spacing in time makes it less accurate, but not wrong. Where the curve stands still (γ' = 0), everything is NaN.

    Raises:
        ValueError: the curve is not one of at least three points in the plane.
    """
    points = np.asarray(curve, dtype=float)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise ValueError(f"expected a plane curve (N >= 3, 2), got {points.shape}")
    velocity = (points[2:] - points[:-2]) / 2
    acceleration = points[2:] - 2 * points[1:-1] + points[:-2]
    speed = np.linalg.norm(velocity, axis=1)
    cross = velocity[:, 0] * acceleration[:, 1] - velocity[:, 1] * acceleration[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        curvature = cross / speed**3
        left_normal = np.stack((-velocity[:, 1], velocity[:, 0]), axis=1) / speed[:, None]
        centre = points[1:-1] + left_normal / curvature[:, None]
        radius = 1 / np.abs(curvature)
    return OsculatingCircles(np.arange(1, len(points) - 1), curvature, radius, centre)


def vertices(curvature: ArrayLike) -> NDArray[np.int64]:
    """Positions of the vertices of a curve: strict local extrema of its curvature (n,), in order."""
    kappa = np.asarray(curvature, dtype=float)
    left, middle, right = kappa[:-2], kappa[1:-1], kappa[2:]
    return 1 + np.flatnonzero(((middle > left) & (middle > right)) | ((middle < left) & (middle < right)))


def centre_displacement(circles: OsculatingCircles) -> Array:
    """How far the centre moves at each circle, (n,): the mean of |c_{i+1} - c_i| and |c_i - c_{i-1}|; one of them at the ends."""
    with np.errstate(invalid="ignore"):
        steps = np.linalg.norm(np.diff(circles.centre, axis=0), axis=1)
    steps = np.where(np.isnan(steps), np.inf, steps)
    return (np.concatenate((steps[:1], steps)) + np.concatenate((steps, steps[-1:]))) / 2


def distance_to(curve: ArrayLike, point: ArrayLike) -> Array:
    """Squared distance d²(t) = |γ(t) - f|² of a trajectory (N, V) to a point (V,): (N,)."""
    return ((np.asarray(curve, dtype=float) - np.asarray(point, dtype=float)) ** 2).sum(axis=-1)


def influence_range(curve: ArrayLike, point: ArrayLike, index: int, tolerance: float = 0.1) -> tuple[int, int]:
    """First and last index of the stretch around `index` on which the distance d(t) to `point` differs from d(index) by at most
    the relative `tolerance`.

    Near a vertex the trajectory follows its osculating circle, so its distance to the centre is nearly constant. The length of
    the stretch says how long the trajectory turns around the form.
    """
    distance = np.sqrt(distance_to(curve, point))
    outside = np.abs(distance - distance[index]) > tolerance * distance[index]
    before, after = np.flatnonzero(outside[:index]), np.flatnonzero(outside[index + 1 :])
    first = int(before[-1]) + 1 if before.size else 0
    last = index + int(after[0]) if after.size else len(distance) - 1
    return first, last


def geometry_table(scores: ArrayLike, steps: ArrayLike, num_components: int = 3) -> pd.DataFrame:
    """Circles of every plane of the first components of a (smoothed) trajectory: scores (N, V), steps (N,).

    One row per plane and inner point: `step`, `pc_x`, `pc_y` (0-based, pc_x > pc_y as in the figures), `x`, `y` (the
    point), `curvature` (signed), `radius`, `centre_x`, `centre_y`, and `is_vertex`.
    """
    trajectory, times = np.asarray(scores, dtype=float), np.asarray(steps)
    parts = []
    for y, x in combinations(range(min(num_components, trajectory.shape[1])), 2):
        circles = osculating_circles(trajectory[:, [x, y]])
        is_vertex = np.zeros(circles.index.size, dtype=bool)
        is_vertex[vertices(circles.curvature)] = True
        parts.append(
            pd.DataFrame(
                {
                    "step": times[circles.index],
                    "pc_x": x,
                    "pc_y": y,
                    "x": trajectory[circles.index, x],
                    "y": trajectory[circles.index, y],
                    "curvature": circles.curvature,
                    "radius": circles.radius,
                    "centre_x": circles.centre[:, 0],
                    "centre_y": circles.centre[:, 1],
                    "is_vertex": is_vertex,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def detect_forms(
    scores: ArrayLike,
    steps: ArrayLike,
    num_components: int = 3,
    window: int | None = None,
    threshold: float = 0.5,
    scatter: ArrayLike | None = None,
) -> pd.DataFrame:
    """Find forms: times at which the evolute is nearly stationary in every plane of the first components at once.

    In each plane, the displacement of the centre of curvature is divided by its running median over 2·window + 1 points. This
    removes the trajectory's changing speed and scale. For each plane the smallest ratio within ± `window`/4 of t is taken,
    because vertices of different planes need not coincide exactly. The *stillness* at t is the largest of these over all
    planes; small values mean that the evolute stands still in every plane. A form is a local minimum of the stillness below
    `threshold`. Of minima closer than `window`, the smallest is kept.

    Args:
        scores: (N, V), a trajectory in principal components. Smooth it first (`smoothing.variable_gaussian_filter`).
        steps: (N,), only copied into the table.
        num_components: number V' of components, which span V'(V'-1)/2 planes.
        window: number of points; by default N/20, but at least 8.
        threshold: largest stillness of a form, relative to the running median. A uniformly turning evolute has ratios near 1.
        scatter: (N,), root mean square distance of the points from the smooth trajectory (`smoothing.local_scatter`). If it is
            given, a form is kept only if the trajectory over its influence range extends farther than `MIN_MOTION` times the
            scatter. This rejects smoothed white noise around a resting point. Noise that is correlated between points is not
            rejected.

    Returns:
        One row per form, in order of time: `index`, `step`, `stillness`, `first_step` and `last_step` of the influence range
        (in the space of the components), `form/<i>`, and `spread`. `form/<i>` is the form's coordinate along component i: the
        median of the centres of curvature over the planes with this component. `spread` is the largest difference between
        planes in a coordinate, relative to the trajectory's extent.

    Raises:
        ValueError: there are fewer than two components, or too few points for the window.
    """
    trajectory, times = np.asarray(scores, dtype=float), np.asarray(steps)
    if trajectory.ndim != 2 or min(trajectory.shape[1], num_components) < 2:
        raise ValueError(
            f"forms need at least two components, got scores {trajectory.shape}, num_components {num_components}"
        )
    trajectory = trajectory[:, :num_components]
    reach = max(8, len(trajectory) // 20) if window is None else window
    if len(trajectory) < 2 * reach + 3:
        raise ValueError(
            f"{len(trajectory)} points are too few for a window of {reach}; use a window below {len(trajectory) // 2 - 1}"
        )
    planes = list(combinations(range(trajectory.shape[1]), 2))
    circles = [osculating_circles(trajectory[:, list(plane)]) for plane in planes]
    stillness = np.max([_stillness(circle, reach) for circle in circles], axis=0)
    columns = [
        "index",
        "step",
        "stillness",
        "first_step",
        "last_step",
        *[f"form/{i}" for i in range(trajectory.shape[1])],
        "spread",
    ]
    rows = []
    for position in _separated_minima(stillness, reach, threshold):
        index = int(circles[0].index[position])
        form, spread = _form_at(trajectory, planes, circles, position)
        first, last = influence_range(trajectory, form, index)
        if scatter is not None and _extent(trajectory[first : last + 1]) < MIN_MOTION * np.asarray(scatter)[index]:
            continue
        rows.append([index, times[index], stillness[position], times[first], times[last], *form, spread])
    return pd.DataFrame(rows, columns=pd.Index(columns)).astype({"index": int})


def _extent(points: Array) -> float:
    return float(np.linalg.norm(np.ptp(points, axis=0)))


def _stillness(circles: OsculatingCircles, window: int) -> Array:
    displacement = centre_displacement(circles)
    # On straight pieces centres are infinite. A large finite number keeps the order, which is all that the median needs.
    finite = np.isfinite(displacement)
    ceiling = displacement[finite].max() if finite.any() else 1.0
    displacement = np.where(finite, displacement, ceiling)
    median = median_filter(displacement, size=2 * window + 1, mode="nearest")
    ratio = displacement / np.maximum(median, np.finfo(float).tiny)
    near = max(1, window // 4)
    padded = np.pad(ratio, near, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * near + 1).min(axis=1)


def _separated_minima(values: Array, window: int, threshold: float) -> list[int]:
    """Positions of the smallest values below the threshold, no two closer than `window`. A flat minimum counts once, at its
    middle."""
    chosen: list[int] = []
    for value in np.unique(values[values < threshold]):
        run = np.flatnonzero(values == value)
        for group in np.split(run, 1 + np.flatnonzero(np.diff(run) > 1)):
            middle = int(group[len(group) // 2])
            if all(abs(middle - other) >= window for other in chosen):
                chosen.append(middle)
    return sorted(chosen)


def _form_at(
    trajectory: Array, planes: list[tuple[int, int]], circles: list[OsculatingCircles], position: int
) -> tuple[Array, float]:
    """The form's coordinates (V,), each the median over the planes, and their largest spread relative to the trajectory's
    extent."""
    coordinates: list[list[float]] = [[] for _ in range(trajectory.shape[1])]
    for plane, circle in zip(planes, circles, strict=True):
        for axis, component in enumerate(plane):
            coordinates[component].append(circle.centre[position, axis])
    extent = np.ptp(trajectory, axis=0)
    form = np.array([np.median(values) for values in coordinates])
    spread = max(
        float(np.ptp(values)) / max(float(extent[i]), np.finfo(float).tiny) for i, values in enumerate(coordinates)
    )
    return form, float(spread)
