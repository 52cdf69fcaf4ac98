"""Can the published stage ends be found in a curve that has the published changes of λ̂?

    python -m benchmarks.detector

The paper gives λ̂ at the five stage ends only. Two curves are drawn through them. *level* has slope 0 at every end, so each end is a rest or
an extremum, which is the best case. *direct* goes monotonically from end to end, so its slope is 0 at extrema only. Noise is added, and two
rules look for the ends: this library's (`icl.analysis.stages.find_boundaries`) and the paper's, local minima of |dλ̂/d log t| below 8 on a
Gaussian process that nearly interpolates. Results go to benchmarks/results/detector.csv, which docs/reproduction.md shows.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from benchmarks.reproduction.comparison import LOG_TOLERANCE
from benchmarks.reproduction.published import CHANGE_OF_LLC
from icl.analysis.gaussian_process import smooth_curve
from icl.analysis.stages import PUBLISHED_STAGE_ENDS, find_boundaries
from icl.config import TrainingConfig, expand_steps
from icl.config.sweeps import expand, load_sweep
from icl.figures.elements import FIRST_STEP, in_order, numbers, rows_where
from icl.figures.families import read_table
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[1]
FAMILY = ROOT / "data" / "L2H4Minf"
RESULTS = ROOT / "benchmarks" / "results" / "detector.csv"
TRAINING = ROOT / "sweeps" / "training-runs" / "L2H4Minf.yaml"
REPEATS = 40
DRAWS = 300
"""Posterior draws of a fit; fewer than for real curves, for speed."""
MAX_SLOPE = 8.0
"""The paper's bound on |dλ̂/d log t| at a boundary."""
INNER = list(PUBLISHED_STAGE_ENDS.items())[:-1]
NOISES = {"as ours": 1.0, "a quarter of ours": 0.25, "a sixteenth of ours": 0.0625}

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]
"""λ̂ as a function of x = log(t + 1)."""


def ends() -> tuple[Array, Array]:
    """x and λ̂ at the start, where λ̂ is set to 0, and at the published ends."""
    steps = np.array([FIRST_STEP, *PUBLISHED_STAGE_ENDS.values()], dtype=float)
    return np.log1p(steps), np.concatenate(([0.0], np.cumsum(list(CHANGE_OF_LLC.values()))))


def level() -> Curve:
    """Through the published ends, with slope 0 at each."""
    places, values = ends()

    def curve(x: Array) -> Array:
        at = np.clip(np.searchsorted(places, x, "right") - 1, 0, len(places) - 2)
        share = np.clip((x - places[at]) / (places[at + 1] - places[at]), 0, 1)
        return values[at] + (values[at + 1] - values[at]) * share**2 * (3 - 2 * share)

    return curve


def direct() -> Curve:
    """Through the published ends, monotone between them (Fritsch and Carlson)."""
    places, values = ends()
    spline = PchipInterpolator(places, values)
    return lambda x: spline(np.clip(x, places[0], places[-1]))


SHAPES: dict[str, Callable[[], Curve]] = {"level": level, "direct": direct}


def grids() -> dict[str, NDArray[np.int64]]:
    """Our checkpoints of seed 1 with published settings, and all that training writes."""
    settings = TrainingConfig.parse(expand(load_sweep(TRAINING))[0])
    dense = [
        step
        for step in expand_steps(settings.checkpointer_config.checkpoint_steps, settings.num_steps)
        if step < settings.num_steps
    ]
    chosen = {"ours": measured()["step"], "the paper's": dense}
    return {name: np.array([step for step in steps if step >= FIRST_STEP]) for name, steps in chosen.items()}


def measured() -> pd.DataFrame:
    """Seed 1 with published settings."""
    return in_order(rows_where(read_table(FAMILY, "llc"), model_seed=1))


def errors_at(steps: NDArray[np.int64]) -> Array:
    """The standard error of our estimates of seed 1, interpolated in log t."""
    table = measured()
    logs = np.interp(np.log1p(steps), np.log1p(numbers(table, "step")), np.log(numbers(table, "llc/mcse")))
    return np.exp(logs)


def by_our_rule(steps: NDArray[np.int64], values: Array, errors: Array) -> Array:
    """The boundaries of `find_boundaries`."""
    return find_boundaries(steps, values, errors, num_draws=DRAWS).steps


def by_the_papers_rule(steps: NDArray[np.int64], values: Array, errors: Array) -> Array:
    """Steps where |dλ̂/d log t| of a Gaussian process without noise is below that of both neighbours, and below `MAX_SLOPE`."""
    del errors  # the paper's fit has none
    speed = np.abs(numbers(smooth_curve(steps, values), "d_dlogt"))
    inner = (speed[1:-1] < speed[:-2]) & (speed[1:-1] < speed[2:]) & (speed[1:-1] < MAX_SLOPE)
    return steps[1:-1][inner].astype(float)


RULES = {"ours": by_our_rule, "the paper's": by_the_papers_rule}


def hits(found: Array) -> NDArray[np.bool_]:
    """(boundaries, ends): which boundary is which end, within the tolerance of docs/reproduction.md."""
    return np.abs(np.log(found[:, None] / np.array([end for _, end in INNER], dtype=float))) <= LOG_TOLERANCE


def trial(shape: str, steps: NDArray[np.int64], errors: Array, repeat: int) -> list[dict[str, object]]:
    """What each rule finds in one noisy curve with these standard errors."""
    values = SHAPES[shape]()(np.log1p(steps)) + errors * np.random.default_rng(repeat).standard_normal(steps.size)
    rows = []
    for rule, find in RULES.items():
        those = hits(find(steps, values, errors))
        stages = zip(dict(INNER), those.any(axis=0).tolist(), strict=True)
        rows.append({"rule": rule, **dict(stages), "others": int((~those.any(axis=1)).sum())})
    return rows


def turns(shape: str) -> list[float]:
    """The local minima of |slope| of the curve itself, by a fine grid."""
    places, _ = ends()
    x = np.linspace(places[0], places[-1], 200_001)
    speed = np.abs(np.gradient(SHAPES[shape]()(x), x))
    return [float(np.expm1(x[i])) for i in range(1, len(x) - 1) if speed[i] < speed[i - 1] and speed[i] <= speed[i + 1]]


def slopes() -> dict[str, float]:
    """The mean slope dλ̂/d log t of each published stage."""
    places, values = ends()
    pairs = zip(pairwise(places), pairwise(values), strict=True)
    return {stage: (b - a) / (y - x) for stage, ((x, y), (a, b)) in zip(PUBLISHED_STAGE_ENDS, pairs, strict=True)}


def table(repeats: int) -> pd.DataFrame:
    """One row per curve, grid, noise and rule: the share of repeats that find each end, and the mean number of other boundaries."""
    rows = []
    for shape in SHAPES:
        for grid, steps in grids().items():
            for name, noise in NOISES.items():
                errors = noise * errors_at(steps)
                found = pd.DataFrame([row for repeat in range(repeats) for row in trial(shape, steps, errors, repeat)])
                for rule, one in found.groupby("rule", sort=False):
                    means = one.drop(columns="rule").mean()
                    rows.append(
                        {"curve": shape, "checkpoints": grid, "noise": name, "rule": rule, "repeats": repeats, **means}
                    )
                print(pd.DataFrame(rows[-len(RULES) :]).to_string(header=len(rows) == len(RULES)), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Make the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="noisy curves per case (%(default)s)")
    repeats = parser.parse_args().repeats
    for shape in SHAPES:
        print(f"{shape}: |slope| has its minima at " + ", ".join(f"{step:,.0f}" for step in turns(shape)))
    made = table(repeats)
    write_atomically(RESULTS, made.round(3).to_csv(index=False).encode())
    print(RESULTS.relative_to(ROOT))


if __name__ == "__main__":
    main()
