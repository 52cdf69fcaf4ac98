"""The section on when things happen in training: extrema, the collapse of layer norms, the specialisation of heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table
from benchmarks.reproduction import published
from benchmarks.reproduction.shipped import Shipped, titles
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.figures.attention import find_roles

PEAK_REACH = 3
"""How many times later than the peak a step may be to be called part of it; late estimates are near everything, being uncertain."""

SMALL_GAIN, COLLAPSED_SHARE, COLLAPSED_MEAN = 0.1, 0.25, 0.9
"""A layer norm has collapsed when this share of its gains is small (below the first number); or when their mean size is below the last."""


@dataclass(frozen=True)
class Place:
    """A place on one run's grid of checkpoints: between `low` and `high`, best at `step` if there is a best."""

    low: int
    high: int
    step: int | None = None
    note: str = ""

    def __str__(self) -> str:
        reach = f"{self.low:,} to {self.high:,}"
        return f"{self.step:,} ({reach})" if self.step is not None else reach + self.note


@dataclass(frozen=True)
class Milestone:
    """One event in all runs.

    Attributes:
        name: what it is.
        published: when the paper has it, in words.
        source: the table that ours come from.
        places: one per run.
    """

    name: str
    published: str
    source: str
    places: Sequence[Place]

    @property
    def first(self) -> int:
        """The earliest best step of a run."""
        return min(place.low if place.step is None else place.step for place in self.places)

    @property
    def last(self) -> int:
        """The latest."""
        return max(place.high if place.step is None else place.step for place in self.places)


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""

    def everywhere(name: str, when: str, source: str, place: Callable[[pd.DataFrame], Place]) -> Milestone:
        return Milestone(name, when, f"`{source}`", [place(run.needed(source)) for run in runs])

    unembedding, attention = "final_norm", "blocks.0.attention_norm"
    share, mean = f"a quarter of gains below {SMALL_GAIN}", f"mean gain below {COLLAPSED_MEAN}"
    found = {
        "closest": everywhere("closest to predicting 0", f"end of LR1, {PUBLISHED_STAGE_ENDS['LR1']:,}", "evals", _closest_to_zero),
        "peak": everywhere("peak of λ̂, published settings", f"near {PUBLISHED_STAGE_ENDS['LR2']:,}", "llc", _peak),
        "last_norm_share": everywhere(f"norm before unembedding: {share}", "in LR3", "layer_norm", _small_gains(unembedding)),
        "first_norm_share": everywhere(f"norm before first attention: {share}", "in LR4", "layer_norm", _small_gains(attention)),
        "last_norm_mean": everywhere(f"norm before unembedding: {mean}", "not given", "layer_norm", _small_mean(unembedding)),
        "first_norm_mean": everywhere(f"norm before first attention: {mean}", "not given", "layer_norm", _small_mean(attention)),
        "heads": everywhere("heads specialise", "{:,} to {:,}".format(*published.HEADS), "attention", _specialisation),
    }  # fmt: skip
    rows = [[each.name, each.published, *map(str, each.places), each.source] for each in found.values()]
    return {
        **found,
        "peak_holds": sum(place.low <= PUBLISHED_STAGE_ENDS["LR2"] <= place.high for place in found["peak"].places),
        "peak_reach": PEAK_REACH,
        "published_heads": published.HEADS,
        "milestones": markdown_table(["step", "published", *titles(runs), "from"], rows),
    }


def _closest_to_zero(evals: pd.DataFrame) -> Place:
    """The minimum of the squared predictions lies between the neighbours of the best checkpoint."""
    steps, distance = (evals.loc[evals["step"] >= 100, name].to_numpy() for name in ("step", "loss_0/mean"))
    best = int(distance.argmin())
    return Place(int(steps[max(best - 1, 0)]), int(steps[min(best + 1, len(steps) - 1)]), int(steps[best]))


def _peak(llc: pd.DataFrame) -> Place:
    """The largest estimate, and all that are within two standard errors of it."""
    top = llc.loc[llc["llc/mean"].idxmax()]
    near = llc.loc[top["llc/mean"] - llc["llc/mean"] <= 2 * np.hypot(top["llc/mcse"], llc["llc/mcse"]), "step"]
    near = near[near <= PEAK_REACH * top["step"]]
    return Place(int(near.min()), int(near.max()), int(top["step"]))


def _small_gains(layer: str) -> Callable[[pd.DataFrame], Place]:
    return lambda table: _reached((_sizes(table, layer) < SMALL_GAIN).groupby(level="step").mean() >= COLLAPSED_SHARE)


def _small_mean(layer: str) -> Callable[[pd.DataFrame], Place]:
    return lambda table: _reached(_sizes(table, layer).groupby(level="step").mean() < COLLAPSED_MEAN)


def _sizes(table: pd.DataFrame, layer: str) -> pd.Series:
    """|gain| of every coordinate of a layer norm, by step."""
    return table[(table["parameter"] == "weight") & (table["layer"] == layer)].set_index("step")["value"].abs()


def _reached(reached: pd.Series) -> Place:
    """Between the last checkpoint before, and the first one where it holds."""
    if not reached.any():
        raise ValueError("a layer norm does not collapse; the page says that all do")
    first = int(np.argmax(reached))
    return Place(int(reached.index[max(first - 1, 0)]), int(reached.index[first]))


def _specialisation(attention: pd.DataFrame) -> Place:
    """When the heads that have a role at the end are half way to it: the first and the last of them."""
    half_way = []
    for role in find_roles(attention):
        mine = attention[
            (attention["block"] == role.block)
            & (attention["head"] == role.head)
            & (attention["token"] % 2 == "xy".index(role.kind))
            & (attention["token"] > 1)
        ]
        course = mine.groupby("step")[role.metric].mean()
        middle = (course.iloc[0] + course.iloc[-1]) / 2
        reached = (course >= middle) == (course.iloc[-1] >= middle)
        half_way.append(int(course.index[len(course) - int(np.argmin(reached[::-1].to_numpy()))]))
    return Place(min(half_way), max(half_way), note=f" ({len(half_way)} roles)")
