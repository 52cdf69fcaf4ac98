"""Developmental stages from the curve of the estimated learning coefficient, with their uncertainty.

Stage boundaries are plateaus of λ̂ against log t (arXiv 2402.02364, section 3): times at which |dλ̂/dlog t| has a
local minimum, either a critical point of λ̂ (the slope changes sign) or a rest between two changes of one sign. Which
minima count is decided here by the curve and its own uncertainty, not by a number chosen for it:

1. A Gaussian process is fitted to λ̂(x), x = log(t + 1), with known or fitted noise; it gives the joint posterior of
   the slope on a fine grid.
2. In a draw of the slope, a minimum of |slope| separates two peaks if it is *resolved*: it lies below half of the
   lower peak (the usual half-maximum criterion for two peaks being two). The lower peak must itself exceed z
   posterior standard deviations of the slope: what the data cannot tell from zero is no change, so it cannot bound a
   stage. z is the two-sided 95 % point over the whole curve, Bonferroni's for the (range of x) / ℓ slopes that a
   curve of length scale ℓ has independently.
3. The boundaries are those of the posterior mean that at least half of the posterior draws have too. The draws also
   give each boundary's spread and its support.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from icl.analysis.gaussian_process import CurveFit, fit_curve

Array = NDArray[np.float64]

PUBLISHED_STAGE_ENDS: Mapping[str, int] = MappingProxyType(
    {"LR1": 1_000, "LR2": 40_000, "LR3": 126_000, "LR4": 320_000, "LR5": 500_000}
)
"""Ends of the five stages of the linear-regression transformer (arXiv 2402.02364, TMLR version; K = 8, model seed 1),
in training steps."""

PUBLISHED_STAGE_TYPES: Mapping[str, str] = MappingProxyType(
    {"LR1": "A", "LR2": "A", "LR3": "B", "LR4": "B", "LR5": "A"}
)
"""A: λ̂ rises while the loss falls. B: λ̂ falls while the loss falls."""

_ERROR_RATE = 0.05  # chance that a flat curve shows a peak anywhere
_RESOLVED = 0.5  # half maximum
_SUPPORT = 0.5  # a majority of the posterior draws
_GRID = 400


@dataclass(frozen=True)
class StageBoundaries:
    """The detected boundaries, in order of time.

    Attributes:
        steps: (S,) training steps of the boundaries inside the curve; S + 1 stages.
        low, high: (S,) 5 % and 95 % quantiles of each boundary's step over the posterior draws that have it.
        support: (S,) share of the draws that have it.
        fit: the fitted curve, against log(step + 1).
    """

    steps: Array
    low: Array
    high: Array
    support: Array
    fit: CurveFit


def find_boundaries(
    steps: ArrayLike,
    llc: ArrayLike,
    std_error: ArrayLike | None = None,
    *,
    num_draws: int = 500,
    seed: int = 0,
) -> StageBoundaries:
    """Detect the stage boundaries of one run.

    Args:
        steps: (N,) training steps, strictly increasing.
        llc: (N,) estimates λ̂.
        std_error: (N,) their standard errors; without them one noise level is fitted by maximum likelihood.
        num_draws: posterior draws.
        seed: of the draws and of the optimiser's restarts.

    Raises:
        ValueError: fewer than eight points, lengths that differ, steps that do not increase, or numbers that are not
            finite.
    """
    times, values = np.asarray(steps, dtype=float), np.asarray(llc, dtype=float)
    if times.size < 8:
        raise ValueError(f"stages need at least eight checkpoints, got {times.size}")
    if times.shape != values.shape or not (np.diff(times) > 0).all():
        raise ValueError("steps must be strictly increasing, with one estimate each")
    x = np.log1p(times)
    spacing = float(np.median(np.diff(x)))
    fit = fit_curve(
        x,
        values,
        "fit" if std_error is None else std_error,
        standardise=True,
        length_scale=1.0,
        # Nothing narrower than the spacing of the data can be seen, nothing wider than their range be told from a trend.
        length_scale_bounds=(spacing, 10 * float(np.ptp(x))),
        seed=seed,
    )
    grid = np.linspace(x[0], x[-1], _GRID)
    noise = _significance(fit) * fit.slope_std(grid)
    _, draws = fit.sample(grid, num_draws, np.random.default_rng(seed))
    found = [grid[resolved_minima(np.abs(draw), noise)] for draw in draws]
    candidates = grid[resolved_minima(np.abs(fit.slope(grid)), noise)]
    kept = []
    for position, (left, right) in zip(candidates, _cells(candidates, grid[0], grid[-1]), strict=True):
        # A draw may have several minima in a cell; the one nearest to the candidate is this boundary's.
        inside = [hits[(hits > left) & (hits <= right)] for hits in found]
        own = np.array([hits[np.argmin(np.abs(hits - position))] for hits in inside if hits.size])
        if own.size >= _SUPPORT * num_draws:
            kept.append((position, *np.quantile(own, [0.05, 0.95]), own.size / num_draws))
    where, low, high, support = np.array(kept).reshape(-1, 4).T
    return StageBoundaries(np.expm1(where), np.expm1(low), np.expm1(high), support, fit)


def resolved_minima(speed: ArrayLike, noise: ArrayLike) -> NDArray[np.int64]:
    """Indices of the minima of a non-negative curve that separate resolved peaks; see rule 2 of the module.

    Neighbouring peaks whose valley is above half of the lower of them are one peak (the lower is absorbed), and so
    are peaks below the noise; the lowest valleys survive longest. Between any two peaks that remain stands one
    minimum.

    Args:
        speed: (N,) values |slope|.
        noise: (N,) or a number: what a peak must exceed.
    """
    curve = np.asarray(speed, dtype=float)
    floor = np.broadcast_to(np.asarray(noise, dtype=float), curve.shape)
    rising = np.diff(curve, prepend=-np.inf) > 0
    falling = np.diff(curve, append=-np.inf) < 0
    peaks = [int(i) for i in np.flatnonzero(rising & falling) if curve[i] > floor[i]]
    while len(peaks) > 1:
        valleys = [left + int(np.argmin(curve[left : right + 1])) for left, right in pairwise(peaks)]
        depth = [curve[v] / min(curve[a], curve[b]) for v, a, b in zip(valleys, peaks[:-1], peaks[1:], strict=True)]
        worst = int(np.argmax(depth))
        if depth[worst] <= _RESOLVED:
            return np.array(valleys, dtype=np.int64)
        peaks.pop(worst if curve[peaks[worst]] < curve[peaks[worst + 1]] else worst + 1)
    return np.array([], dtype=np.int64)


def stage_table(
    ends: Mapping[str, float] | ArrayLike,
    steps: ArrayLike,
    loss: ArrayLike,
    llc: ArrayLike,
    *,
    num_draws: int = 500,
    seed: int = 0,
    noise: Literal["fit"] | ArrayLike = "fit",
) -> pd.DataFrame:
    """Change of loss and of λ̂ over each stage, from smooth fits, with standard deviations.

    Args:
        ends: the end of each stage in training steps, with names or without (then S1, S2, ...); the first stage
            starts at the first step.
        steps, loss, llc: (N,) the curves of one run.
        noise: of λ̂: fitted, or standard errors (N,). The loss is measured on a fixed set and its noise is always
            fitted.

    Returns:
        One row per stage: `stage`, `start_step`, `end_step`, `type`, `delta_loss`, `delta_loss_std`, `delta_llc`,
        `delta_llc_std`. The type is A where the loss falls and λ̂ rises, B where both fall, and "other" where the
        loss rises.

    Raises:
        ValueError: ends that do not increase or lie outside the curve.
    """
    if isinstance(ends, Mapping):
        names, stops = list(ends), np.asarray(list(ends.values()), dtype=float)
    else:
        stops = np.atleast_1d(np.asarray(ends, dtype=float))
        names = [f"S{i + 1}" for i in range(stops.size)]
    times = np.asarray(steps, dtype=float)
    edges = np.concatenate((times[:1], stops))
    # The last checkpoint is one step short of the nominal end of training.
    if not (np.diff(edges) > 0).all() or edges[-1] > times[-1] + 1:
        raise ValueError(f"stage ends must increase within steps {times[0]:g}..{times[-1]:g}, got {stops.tolist()}")
    at = np.log1p(np.minimum(edges, times[-1]))
    changes = {}
    for name, values, curve_noise in (("loss", loss, "fit"), ("llc", llc, noise)):
        fit = fit_curve(
            np.log1p(times),
            values,
            curve_noise,
            standardise=True,
            length_scale=1.0,
            length_scale_bounds=(0.1, 100.0),
            seed=seed,
        )
        draws, _ = fit.sample(at, num_draws, np.random.default_rng(seed))
        changes[f"delta_{name}"] = np.diff(fit.mean(at))
        changes[f"delta_{name}_std"] = np.diff(draws, axis=1).std(axis=0)
    table = pd.DataFrame({"stage": names, "start_step": edges[:-1], "end_step": edges[1:], **changes})
    kinds = np.where(table["delta_loss"] >= 0, "other", np.where(table["delta_llc"] > 0, "A", "B"))
    table.insert(3, "type", kinds)
    return table


def boundary_table(boundaries: StageBoundaries, published: Mapping[str, int] = PUBLISHED_STAGE_ENDS) -> pd.DataFrame:
    """The detected boundaries beside the nearest published ones in log t.

    One row per boundary: `step`, `low`, `high`, `support`, `published` (name), `published_step`, `log_ratio` =
    log(step / published step).
    """
    names, steps = list(published), np.array(list(published.values()), dtype=float)
    rows = []
    for step, low, high, support in zip(
        boundaries.steps, boundaries.low, boundaries.high, boundaries.support, strict=True
    ):
        nearest = int(np.argmin(np.abs(np.log(steps) - np.log(max(step, 1.0)))))
        rows.append([step, low, high, support, names[nearest], steps[nearest], np.log(max(step, 1.0) / steps[nearest])])
    columns = ["step", "low", "high", "support", "published", "published_step", "log_ratio"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def _significance(fit: CurveFit) -> float:
    """The number of standard deviations that a slope must exceed to differ from zero anywhere on the curve."""
    independent = max(1.0, float(np.ptp(fit.x)) / fit.length_scale)
    return float(norm.isf(_ERROR_RATE / 2 / independent))


def _cells(candidates: Array, first: float, last: float) -> list[tuple[float, float]]:
    """The stretch that belongs to each candidate: up to half way to its neighbours."""
    middles = (candidates[1:] + candidates[:-1]) / 2
    edges = np.concatenate(([first - 1], middles, [last + 1]))
    return list(pairwise(edges)) if candidates.size else []
