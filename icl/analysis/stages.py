"""Developmental stages from the curve of the estimated learning coefficient, with their uncertainty.

Stage boundaries are plateaus of λ̂ as a function of x = log(t + 1) (arXiv 2402.02364, section 3). They are local minima of
|dλ̂/dx|. A boundary is either an extremum of λ̂, where the slope changes sign, or a rest between two changes of the same
sign. The curve and its uncertainty decide which minima count:

1. A Gaussian process is fitted to λ̂(x) (`gaussian_process`). Its noise are the estimates' standard errors, and its smoothness
   maximises the marginal likelihood. It gives the joint posterior of curve and slope.
2. A peak of |slope| reaches from one local minimum of |slope| to the next. It counts if λ̂ changes significantly between any
   two places on it. The test is simultaneous over all pairs of places. It uses one band width, in posterior standard
   deviations, such that 95 % of the posterior draws stay within the band around the mean's changes at all pairs. A change of
   the mean is significant if it exceeds the band width.
   Changes over intervals of every width are tested because neighbouring estimates say little about the slope, while distant
   ones say much about a difference. So a slow fall is found although its slope is significant at no single place (the idea of
   multiscale tests, Dümbgen & Spokoiny 2001, Annals of Statistics 29:124). A peak is *sharp* if its slope is beyond the
   corresponding band of slopes at any place.
3. Between two peaks lies a boundary if they are *resolved*. They are resolved if their signs differ. They are also resolved if
   both are sharp and |slope| falls between them to half of the lower top or less. The boundary's probability is the share of
   posterior draws in which this holds, with the tops at the places of the mean's tops, and in which the most significant
   change of each peak has the mean's sign. Peaks of one sign must be sharp because drawn slopes of a steady slow fall have
   minima anywhere.
4. The least probable boundary is removed, again and again, until every boundary has a probability of at least 95 %. If its two
   peaks have one sign, they are joined; otherwise the less significant peak is dropped. If no boundary is left, none is
   significant.

The bands use the posterior with the fitted hyperparameters. tests/analysis/test_stages.py measures how often curves without a
boundary get one.

The place of a boundary is the median, over the draws, of their minimum of |slope| between the two peaks. Its interval holds
90 % of these minima. (The minimum of the mean curve is less accurate, because the fit swings before a sharp rise. On curves
with known boundaries its errors were 1.1 to 1.6 times as large, see docs/log.md.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from icl.analysis.gaussian_process import CurveFit, fit_curve

Array = NDArray[np.float64]

PUBLISHED_STAGE_ENDS: Mapping[str, int] = MappingProxyType(
    {"LR1": 1_000, "LR2": 40_000, "LR3": 126_000, "LR4": 320_000, "LR5": 500_000}
)
"""Ends of the five stages of the linear-regression transformer, in training steps (arXiv 2402.02364, TMLR version; K = 8, model
seed 1)."""

PUBLISHED_STAGE_TYPES: Mapping[str, str] = MappingProxyType(
    {"LR1": "A", "LR2": "A", "LR3": "B", "LR4": "B", "LR5": "A"}
)
"""Types of the published stages. A: λ̂ rises while the loss falls. B: both fall."""

FEWEST_ESTIMATES = 8
"""The fewest estimates that boundaries can be found in."""

_RESOLVED = 0.5  # half maximum
_GRID = 400
_PLACES = 100  # number of places; changes are tested between all pairs of them


@dataclass(frozen=True)
class StageBoundaries:
    """The significant boundaries, in order of time. S boundaries make S + 1 stages.

    Attributes:
        steps: (S,) training steps: the median over the posterior draws that have the boundary.
        low, high: (S,) 5 % and 95 % quantiles of the step over these draws.
        probability: (S,) share of all draws that have the boundary.
        extremum: (S,) whether λ̂ has an extremum there; otherwise it rests between two changes of the same sign.
        fit: the fitted curve, as a function of log(step + 1).
    """

    steps: Array
    low: Array
    high: Array
    probability: Array
    extremum: NDArray[np.bool_]
    fit: CurveFit

    def __str__(self) -> str:
        if not self.steps.size:
            return "no boundary is significant"
        rows = zip(self.steps, self.low, self.high, self.probability, strict=True)
        return ", ".join(
            f"{step:.0f} ({low:.0f} to {high:.0f}, probability {share:.2f})" for step, low, high, share in rows
        )


def detectable(estimates: pd.DataFrame, *quantities: str) -> pd.DataFrame:
    """The estimates of a run that a curve is fitted to, in order of their steps.

    These are the rows whose λ̂ and `quantities` are finite. A standard error that is not known becomes the largest of the run, or 0 if
    none is known; then the scatter of the curve says how exact λ̂ is.

    Args:
        estimates: `step`, `llc/mean`, and if known `llc/mcse`.
        quantities: other columns that must be finite.
    """
    known = np.isfinite(estimates[["llc/mean", *quantities]].to_numpy(dtype=float)).all(axis=1)
    rows = pd.DataFrame(estimates.loc[known]).sort_values("step", kind="stable")
    errors = rows["llc/mcse"].to_numpy(dtype=float) if "llc/mcse" in rows else np.full(len(rows), np.nan)
    exact = np.isfinite(errors)
    return rows.assign(**{"llc/mcse": np.where(exact, errors, errors[exact].max(initial=0.0))})


def find_boundaries(
    steps: ArrayLike,
    llc: ArrayLike,
    std_errors: ArrayLike = 0.0,
    *,
    level: float = 0.95,
    num_draws: int = 1000,
    seed: int = 0,
) -> StageBoundaries:
    """Detect the stage boundaries of one run.

    The result does not depend on the units of λ̂.

    Args:
        steps: (N,) training steps, strictly increasing, with any spacing.
        llc: (N,) estimates λ̂.
        std_errors: (N,) their standard errors, or one number. Additional scatter is fitted.
        level: level of the bands, and smallest probability of a boundary.
        num_draws: number of posterior draws.
        seed: seed of the draws.

    Raises:
        ValueError: there are fewer than eight points, lengths differ, steps do not increase, or numbers are not finite.
    """
    times, values = np.asarray(steps, dtype=float), np.asarray(llc, dtype=float)
    if times.size < FEWEST_ESTIMATES:
        raise ValueError(f"stages need at least {FEWEST_ESTIMATES} checkpoints, got {times.size}")
    if times.shape != values.shape or not (np.diff(times) > 0).all():
        raise ValueError("steps must be strictly increasing, with one estimate each; sort the table first")
    x = np.log1p(times)
    fit = fit_curve(x, values, std_errors)
    grid = np.linspace(x[0], x[-1], _GRID)
    slope = fit.slope(grid)
    curves, draws = fit.sample(grid, num_draws, np.random.default_rng(seed))
    spread = np.maximum(fit.slope_std(grid), np.finfo(float).tiny)
    sharp = np.abs(slope) / spread > np.quantile(np.max(np.abs(draws - slope) / spread, axis=1), level)
    peaks = _significant_peaks(np.abs(slope), sharp, fit.mean(grid), curves, level)
    found = [_between(slope, curves, draws, left, right) for left, right in pairwise(peaks)]
    while found and min(boundary.probability for boundary in found) < level:
        worst = int(np.argmin([boundary.probability for boundary in found]))
        left, right = peaks[worst : worst + 2]
        more_certain = left if left.certainty >= right.certainty else right
        peaks[worst : worst + 2] = [more_certain if found[worst].extremum else left.joined(right)]
        found = [_between(slope, curves, draws, left, right) for left, right in pairwise(peaks)]
    places = [grid[np.quantile(boundary.places, [0.05, 0.5, 0.95]).round().astype(int)] for boundary in found]
    low, middle, high = np.expm1(np.reshape(places, (-1, 3))).T
    return StageBoundaries(
        steps=middle,
        low=low,
        high=high,
        probability=np.array([boundary.probability for boundary in found]),
        extremum=np.array([boundary.extremum for boundary in found], dtype=bool),
        fit=fit,
    )


def stage_table(
    ends: Mapping[str, float] | ArrayLike,
    steps: ArrayLike,
    loss: ArrayLike,
    llc: ArrayLike,
    std_errors: ArrayLike = 0.0,
    *,
    num_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Change of loss and of λ̂ over each stage, from smooth fits, with standard deviations.

    Args:
        ends: the end of each stage in training steps, with names or without (then S1, S2, ...). The first stage starts at the
            first step.
        steps, loss, llc: (N,) the curves of one run.
        std_errors: standard errors of λ̂, (N,) or one number. The loss has none, because it is measured on fixed sequences; its
            scatter is fitted.
        num_draws: number of posterior draws.
        seed: seed of the draws.

    Returns:
        One row per stage: `stage`, `start_step`, `end_step`, `type`, `delta_loss`, `delta_loss_std`, `delta_llc`,
        `delta_llc_std`, and `type_probability`, the share of posterior draws with this type. The type is A if the loss falls
        and λ̂ rises, B if both fall, and "other" if the loss rises.

    Raises:
        ValueError: the ends do not increase, or lie outside the curve.
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
    rng = np.random.default_rng(seed)
    changes, drawn = {}, {}
    for name, values, errors in (("loss", loss, 0.0), ("llc", llc, std_errors)):
        fit = fit_curve(np.log1p(times), values, errors)
        drawn[name] = np.diff(fit.sample(at, num_draws, rng)[0], axis=1)
        changes[f"delta_{name}"] = np.diff(fit.mean(at))
        changes[f"delta_{name}_std"] = drawn[name].std(axis=0)
    kinds = _stage_types(changes["delta_loss"], changes["delta_llc"])
    agreement = (_stage_types(drawn["loss"], drawn["llc"]) == kinds).mean(axis=0)
    table = pd.DataFrame({"stage": names, "start_step": edges[:-1], "end_step": edges[1:], "type": kinds})
    return table.assign(**changes, type_probability=agreement)


def boundary_table(boundaries: StageBoundaries, published: Mapping[str, int] = PUBLISHED_STAGE_ENDS) -> pd.DataFrame:
    """The detected boundaries beside the nearest published ones in log t.

    One row per boundary: `step`, `low`, `high`, `probability`, `kind` ("extremum" or "plateau"), `published` (name),
    `published_step`, `log_ratio` = log(step / published step).
    """
    names, ends = list(published), np.array(list(published.values()), dtype=float)
    ratios = np.log(np.maximum(boundaries.steps, 1.0)[:, None] / ends[None, :])
    nearest = np.abs(ratios).argmin(axis=1)
    return pd.DataFrame(
        {
            "step": boundaries.steps,
            "low": boundaries.low,
            "high": boundaries.high,
            "probability": boundaries.probability,
            "kind": np.where(boundaries.extremum, "extremum", "plateau"),
            "published": [names[i] for i in nearest],
            "published_step": ends[nearest],
            "log_ratio": ratios[np.arange(nearest.size), nearest],
        }
    )


@dataclass(frozen=True)
class _Peak:
    """A peak of |slope|, or several joined peaks of one sign. Places are indices of the grid.

    Attributes:
        first, last: the place of its top; for joined peaks, the tops of the first and of the last one.
        span: the two places between which the curve changes most significantly.
        certainty: size of that change, in posterior standard deviations.
        sharp: whether its slope is significant at any place.
    """

    first: int
    last: int
    span: tuple[int, int]
    certainty: float
    sharp: bool

    def joined(self, later: "_Peak") -> "_Peak":
        """This peak joined with a later one."""
        return _Peak(
            self.first,
            later.last,
            (self.span[0], later.span[1]),
            max(self.certainty, later.certainty),
            self.sharp or later.sharp,
        )


@dataclass(frozen=True)
class _Boundary:
    """The boundary between two peaks of |slope|. `places` are the minima of the draws, as indices of the grid."""

    probability: float
    extremum: bool
    places: NDArray[np.int64]


def _between(slope: Array, curves: Array, draws: Array, left: _Peak, right: _Peak) -> _Boundary:
    tops = [left.last, right.first]
    signs_known = np.ones(len(draws), dtype=bool)
    for peak, top in zip((left, right), tops, strict=True):
        start, end = peak.span
        signs_known &= (curves[:, end] - curves[:, start]) * slope[top] > 0
    extremum = bool(slope[tops[0]] * slope[tops[1]] < 0)
    speed = np.abs(draws[:, tops[0] : tops[1] + 1])
    lower_top = np.abs(draws[:, tops]).min(axis=1)
    rests = speed.min(axis=1) <= _RESOLVED * lower_top if left.sharp and right.sharp else np.zeros_like(signs_known)
    holds = signs_known & (extremum | rests)
    chosen = holds if holds.any() else np.ones_like(holds)
    return _Boundary(
        probability=float(holds.mean()),
        extremum=extremum,
        places=tops[0] + speed[chosen].argmin(axis=1),
    )


def _significant_peaks(speed: Array, sharp: NDArray[np.bool_], mean: Array, curves: Array, level: float) -> list[_Peak]:
    """The peaks of the speed |slope| over which the curve changes significantly. A peak reaches from one local minimum to the next."""
    places = np.linspace(0, speed.size - 1, _PLACES).round().astype(int)
    first, second = places[np.array(np.triu_indices(_PLACES, 1))]
    change, drawn = mean[second] - mean[first], curves[:, second] - curves[:, first]
    spread = np.maximum(drawn.std(axis=0), np.finfo(float).tiny)
    band = np.quantile(np.max(np.abs(drawn - change) / spread, axis=1), level)
    certainty = np.abs(change) / spread
    minima = np.flatnonzero((speed[1:-1] < speed[:-2]) & (speed[1:-1] <= speed[2:])) + 1
    peaks = []
    for start, end in pairwise([0, *minima, speed.size - 1]):
        inside = np.where((first >= start) & (second <= end), certainty, 0.0)
        best = int(inside.argmax())
        if inside[best] > band:
            top = start + int(speed[start : end + 1].argmax())
            span = int(first[best]), int(second[best])
            peaks.append(_Peak(top, top, span, float(inside[best]), bool(sharp[start : end + 1].any())))
    return peaks


def _stage_types(delta_loss: Array, delta_llc: Array) -> NDArray[np.str_]:
    return np.where(delta_loss >= 0, "other", np.where(delta_llc > 0, "A", "B"))
