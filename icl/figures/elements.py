"""Parts that figures share: the axis of training steps with its stages, lines per token, bands of errors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from icl.figures.style import MEAN, MODEL, Colour, LineStyle, shades, token_colours

Stages = Mapping[str, float]
"""Name of a stage -> its end in training steps, in order. With an empty mapping no stages are drawn."""


@dataclass(frozen=True)
class StageEnds(Mapping[str, float]):
    """Stages, and the first step that a figure shows.

    Attributes:
        ends: the end of each stage, in order.
        first: the first step on the axis.
        exact: whether axes begin and end exactly at their first and last step. Otherwise there is room for the outermost markers.
    """

    ends: Mapping[str, float]
    first: float = 1
    exact: bool = False

    def __getitem__(self, stage: str) -> float:
        return self.ends[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ends)

    def __len__(self) -> int:
        return len(self.ends)


NO_STAGES = StageEnds({})
FIRST_STEP = 100
"""The first step on the axis of the paper's figures."""

HEALTHY, UNTESTED = "healthy", "not tested"
"""A verdict, and the first words of one of which no test failed."""
_STAGE_COLOURS: Sequence[tuple[float, float, float]] = (
    (0.992, 0.727, 0.492), (0.914, 0.369, 0.051), (0.423, 0.684, 0.840), (0.0, 0.346, 0.639), (0.591, 0.591, 0.591),
)  # fmt: skip
_STAGE_ALPHA = 0.2
_NAME_INCHES = 0.18
_ROOM = 0.015
"""Room beyond the first and the last step, as a share of the axis."""


def first_step(stages: Stages) -> float:
    """The first step on the axis, by default."""
    return stages.first if isinstance(stages, StageEnds) else FIRST_STEP


def stage_colours(stages: Stages) -> dict[str, tuple[float, float, float]]:
    """The paper's colours for stages, in order. In the paper, oranges are stages in which λ̂ rises, and blues those in which it falls."""
    return {name: _STAGE_COLOURS[i % len(_STAGE_COLOURS)] for i, name in enumerate(stages)}


def step_axis(axis: Axes, stages: Stages, last: float, first: float | None = None, names: bool = True) -> None:
    """Make x the logarithmic axis of training steps from `first` (by default that of the stages) to `last`, with the stages
    shaded and named at the top."""
    first = first or first_step(stages)
    last = max(last, 2 * first)
    room = 1 if getattr(stages, "exact", False) else (last / first) ** _ROOM
    left, right = first / room, last * room
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    axis.set_xlabel("training step $t$")
    axis.xaxis.set_minor_formatter(NullFormatter())
    start = left
    for (name, end), colour in zip(stages.items(), stage_colours(stages).values(), strict=True):
        begins, ends = max(start, left), end if end < last else right
        if ends > begins:
            axis.axvspan(begins, ends, color=colour, alpha=_STAGE_ALPHA, lw=0, zorder=0)
            # Named too, because colours are lost in grey print; but only if there is room for the name.
            if names and math.log(ends / begins) / math.log(right / left) * _inches(axis) > _NAME_INCHES:
                place = math.sqrt(begins * ends), 1.0
                axis.annotate(
                    name, place, xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=6, alpha=0.8
                )
        start = end


def _inches(axis: Axes) -> float:
    """The approximate width of a panel in inches, before the figure is laid out."""
    return axis.bbox.width / axis.figure.dpi


def stage_legend(figure: Figure, stages: Stages) -> None:
    """Patches of the stages in one row below the figure."""
    patches = [Patch(color=colour, alpha=_STAGE_ALPHA, label=name) for name, colour in stage_colours(stages).items()]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """The labels of all panels below the figure, each once, with lines before marks."""
    named = {str(line.get_label()): line for axis in axes for line in axis.get_lines()}
    shown = [line for text, line in named.items() if not text.startswith("_")]
    shown.sort(key=lambda line: line.get_linestyle() == "None")
    figure.legend(handles=shown, loc="outside lower center", ncols=4)


def last_step(*tables: pd.DataFrame, stages: Stages = NO_STAGES) -> float:
    """The last step on the axis: the end of the last stage, or the last step of the tables if they end earlier."""
    reached = max(float(numbers(table, "step").max()) for table in tables)
    end = max(stages.values(), default=reached)
    return end if reached > 0.9 * end else reached + 1


def token_count(table: pd.DataFrame, name: str) -> int:
    """K, the number of columns name/0, name/1, ...

    Raises:
        ValueError: there is no such column.
    """
    count = 0
    while f"{name}/{count}" in table.columns:
        count += 1
    if count == 0:
        raise ValueError(
            f"the table has no column {name}/0; its columns: {', '.join(map(str, table.columns[:12]))} ..."
        )
    return count


def token_lines(
    axis: Axes, table: pd.DataFrame, name: str, colours: Sequence[Colour] | None = None, label: str = "$k={}$"
) -> None:
    """One thin line per token, from the columns name/0, name/1, ... The legend names the first and the last, counted from 1."""
    count, table = token_count(table, name), after_start(table)
    for k, colour in enumerate(colours or token_colours(count)):
        text = label.format(k + 1) if k in (0, count - 1) else None
        axis.plot(table["step"], table[f"{name}/{k}"], color=colour, lw=0.8, label=text)


def estimate_line(
    axis: Axes,
    table: pd.DataFrame,
    label: str | None = None,
    colour: str | Colour = MODEL,
    name: str = "llc/mean",
    style: LineStyle = "-",
    band: float = 0.25,
) -> None:
    """Estimates with a band of ±2 Monte-Carlo standard errors and the marks of their verdicts. `band` is the opacity of the band."""
    table = after_start(table)
    axis.plot(table["step"], table[name], color=colour, label=label, marker=".", ms=2.5, lw=1, ls=style)
    if "llc/mcse" in table.columns:
        error = 2 * table["llc/mcse"]
        axis.fill_between(table["step"], table[name] - error, table[name] + error, color=colour, alpha=band, lw=0)
    mark_verdicts(axis, table, name, named=label is not None)


def mark_verdicts(
    axis: Axes, table: pd.DataFrame, name: str, named: bool = True, of: str = "", at: str = "step"
) -> None:
    """A cross where a test of the chains failed, a ring where none failed but some were not made or were too noisy to say (`verdict`).

    Args:
        name, at: the columns of the marks' heights and places.
        named: whether the marks get a line in the legend, once per axis.
        of: what the legend puts before it.
    """
    if "verdict" not in table.columns:
        return
    verdicts = table["verdict"].fillna("")
    # A verdict names what failed before what was not tested.
    untested = verdicts.str.startswith(UNTESTED) | (verdicts == "")
    for chosen, marker, text in (
        ((verdicts != HEALTHY) & ~untested, "x", f"{of}a test of the chains failed"),
        (untested, "o", f"{of}not all tests of the chains were made"),
    ):
        rows = table[chosen]
        shown = named and len(rows) and not _has_label(axis, text)
        axis.plot(
            rows[at], rows[name], ls="", marker=marker, ms=3.5, mew=0.8, mfc="none", color="black", zorder=3,
            label=text if shown else None,
        )  # fmt: skip


def step_colours(steps: Sequence[int]) -> tuple[dict[int, Colour], ScalarMappable]:
    """A colour for each training step, by its logarithm, and the mappable for a colour bar. Step 0 gets the first colour."""
    positive = [step for step in steps if step > 0] or [1]
    scale = LogNorm(min(positive), max(max(positive), 2 * min(positive)), clip=True)
    shown = ScalarMappable(scale, ListedColormap(shades("viridis", 256)))
    colours = shown.to_rgba(np.maximum(steps, 1)).tolist()
    return {step: (r, g, b, a) for step, (r, g, b, a) in zip(steps, colours, strict=True)}, shown


def after_start(table: pd.DataFrame) -> pd.DataFrame:
    """The table without step 0, which has no place on a logarithmic axis."""
    return table.loc[numbers(table, "step") > 0]


def in_sight(table: pd.DataFrame, stages: Stages) -> pd.DataFrame:
    """The rows from the first step of the figure on; all of a run that ends before it."""
    late = table.loc[numbers(table, "step") >= first_step(stages)]
    return late if len(late) else table


def _has_label(axis: Axes, start: str) -> bool:
    return any(str(line.get_label()).startswith(start) for line in axis.get_lines())


def mean_and_spread(axis: Axes, steps: Sequence[float], mean: pd.Series, spread: pd.Series, label: str) -> None:
    """A red line for the mean, with a band of one standard deviation."""
    axis.plot(steps, mean, color=MEAN, label=label, zorder=4)
    axis.fill_between(steps, mean - spread, mean + spread, color=MEAN, alpha=0.15, lw=0, zorder=3)


def numbers(table: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A column as floats."""
    return table[column].to_numpy(dtype=float)


def rows_where(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows that have these values in these columns."""
    kept = np.ones(len(table), dtype=bool)
    for column, value in values.items():
        kept &= (table[column] == value).to_numpy()
    return table.loc[kept]


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows sorted by step."""
    return table.sort_values("step", kind="stable")
