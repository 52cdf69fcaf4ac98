"""The section on whether the published stage ends can be found in a curve with the published changes of λ̂ (`benchmarks.detector`)."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.detector import INNER, MAX_SLOPE, RESULTS, slopes, turns
from benchmarks.pages import markdown_table
from benchmarks.reproduction.shipped import Shipped
from icl.figures.elements import numbers, rows_where


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    del runs
    found = pd.read_csv(RESULTS)
    return {
        "power": {name: counts(found, *case) for name, case in CASES.items()},
        "power_repeats": int(numbers(found, "repeats").max()),
        "power_table": _table(found),
        "published_slope": slopes(),
        "papers_slope_bound": MAX_SLOPE,
        "direct_turns": " and ".join(f"{step:,.0f}" for step in turns("direct")),
    }


CASES = {
    "level_now": ("level", "ours", "as ours", "ours"),
    "level_dense": ("level", "the paper's", "as ours", "ours"),
    "level_best": ("level", "the paper's", "a quarter of ours", "ours"),
    "direct_best": ("direct", "the paper's", "a sixteenth of ours", "ours"),
    "papers_dense": ("level", "the paper's", "as ours", "the paper's"),
}
"""Name in the page -> curve, checkpoints, noise and rule."""


def counts(found: pd.DataFrame, curve: str, checkpoints: str, noise: str, rule: str) -> dict[str, float]:
    """Stage -> the number of noisy curves in which its end was found, and the mean number of `others` in a curve."""
    row = rows_where(found, curve=curve, checkpoints=checkpoints, noise=noise, rule=rule).iloc[0]
    return {name: round(float(row[name] * row["repeats"])) for name in dict(INNER)} | {"others": float(row["others"])}


def _table(found: pd.DataFrame) -> str:
    case = ["curve", "checkpoints", "noise", "rule"]
    rows = []
    for _, row in found.iterrows():
        times = (f"{row[stage] * row['repeats']:.0f}" for stage in dict(INNER))
        rows.append([*(row[name] for name in case), *times, f"{row['others']:.2f}"])
    return markdown_table(["curve", "checkpoints", "standard errors", "rule", *dict(INNER), "other boundaries"], rows)
