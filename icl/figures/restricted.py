"""Restricted learning coefficients: λ̂ of a group of parameters, where only these move, along one run."""

import json
from dataclasses import dataclass

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from icl.figures.elements import (
    NO_STAGES,
    StageEnds,
    Stages,
    after_start,
    estimate_line,
    first_step,
    in_order,
    last_step,
    numbers,
    rows_where,
    stage_legend,
    step_axis,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, page, panels, seed_looks

INCLUDED, EXCLUDED = "sampler_config.include", "sampler_config.exclude"
"""The columns that name the group that moves, and the group that stays while all else moves. Both are JSON lists of patterns."""

_EVERYTHING, _OUTER, _BLOCKS = "everything", "embeddings, unembedding", "blocks"
_SUM = "sum of its parts"
_COLUMNS = 2


@dataclass(frozen=True)
class Group:
    """A group of parameters of the transformer.

    Attributes:
        kind: the panel that it is drawn in.
        name: within its panel.
        patterns: as in `icl.sampling.restriction`.
        part: whether it is one of the parts, which are disjoint and together all parameters.
    """

    kind: str
    name: str
    patterns: tuple[str, ...]
    part: bool = False

    @property
    def key(self) -> str:
        """Its entry in the columns of a table."""
        return json.dumps(self.patterns)

    def __str__(self) -> str:
        return self.name if self.kind in (_EVERYTHING, _OUTER, _BLOCKS) else f"{self.kind}, {self.name}"


_EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")

GROUPS = (
    Group(_EVERYTHING, "everything", ("**",)),
    Group(_OUTER, "token embedding", _EMBEDDINGS[:1], part=True),
    Group(_OUTER, "position embedding", _EMBEDDINGS[1:], part=True),
    Group(_OUTER, "both embeddings", _EMBEDDINGS),
    Group(_OUTER, "unembedding", ("unembedding.*",), part=True),
    Group("layer norms", "before first attention", ("blocks.0.attention_norm.*",), part=True),
    Group("layer norms", "before first MLP", ("blocks.0.mlp_norm.*",), part=True),
    Group("layer norms", "before second attention", ("blocks.1.attention_norm.*",), part=True),
    Group("layer norms", "before second MLP", ("blocks.1.mlp_norm.*",), part=True),
    Group("layer norms", "before unembedding", ("final_norm.*",), part=True),
    Group("layer norms", "all five", ("blocks.*.attention_norm.*", "blocks.*.mlp_norm.*", "final_norm.*")),
    Group("MLPs", "first block", ("blocks.0.mlp.**",), part=True),
    Group("MLPs", "second block", ("blocks.1.mlp.**",), part=True),
    Group("MLPs", "both", ("blocks.*.mlp.**",)),
    Group("attention", "first block", ("blocks.0.attention.**",), part=True),
    Group("attention", "second block", ("blocks.1.attention.**",), part=True),
    Group("attention", "both", ("blocks.*.attention.**",)),
    Group(_BLOCKS, "whole first block", ("blocks.0.**",)),
    Group(_BLOCKS, "whole second block", ("blocks.1.**",)),
)
"""The groups of the sweeps `10-L2H4-*`."""


def grouped(table: pd.DataFrame, column: str = INCLUDED) -> dict[Group, pd.DataFrame]:
    """The rows of each group that a table has, by step. A group that is not among GROUPS has a panel with others like it."""
    known = {group.key: group for group in GROUPS}
    keys = {str(key) for key in table[column]}
    ordered = [key for key in known if key in keys] + sorted(keys - set(known))
    return {
        known.get(key) or Group("other groups", ", ".join(json.loads(key)), tuple(json.loads(key))): in_order(
            rows_where(table, **{column: key})
        )
        for key in ordered
    }


def sum_of_parts(groups: dict[Group, pd.DataFrame]) -> pd.DataFrame:
    """`step`, `llc/mean` and `llc/mcse` of the sum of λ̂ over the parts, at the steps that all of them have. Errors are taken for
    independent. No rows if a part is missing."""
    parts = [groups[group] for group in GROUPS if group.part and group in groups]
    if len(parts) < sum(group.part for group in GROUPS):
        return pd.DataFrame({"step": [], "llc/mean": [], "llc/mcse": []})
    wide = pd.concat(parts).pivot(index="step", columns=INCLUDED, values=["llc/mean", "llc/mcse"]).dropna()
    mean, error = wide["llc/mean"].sum(axis=1), (wide["llc/mcse"] ** 2).sum(axis=1) ** 0.5
    return pd.DataFrame({"step": wide.index, "llc/mean": mean.to_numpy(), "llc/mcse": error.to_numpy()})


@page()
def restricted_estimates(table: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """λ̂ of each group over training, one panel per kind of group. The panel of everything also has the sum over the parts.

    Args:
        table: one run: `sampler_config.include` (the group), `step`, `llc/mean`, and if known `llc/mcse`, `verdict`.
        stages: the end of each stage.
    """
    groups = grouped(table)
    kinds = list(dict.fromkeys(group.kind for group in groups))
    lines = -(-len(kinds) // _COLUMNS)
    figure, axes = panels(lines, _COLUMNS, FULL_WIDTH, 1.25 * HEIGHT * lines)
    first = max(first_step(stages), numbers(after_start(table), "step").min() / 1.5)
    marks: dict[str, Artist] = {}
    for axis, kind in zip(axes, kinds, strict=False):
        mine = [group for group in groups if group.kind == kind]
        for group, (colour, style) in zip(mine, seed_looks(len(mine)), strict=True):
            estimate_line(axis, groups[group], group.name, colour, style=style, band=0.2)
        if kind == _EVERYTHING and len(parts := sum_of_parts(groups)):
            estimate_line(axis, parts, _SUM, "black", style=":", band=0.1)
        step_axis(axis, stages or StageEnds({}, first), last_step(table, stages=stages), first)
        axis.axhline(0, color="black", lw=0.5)
        axis.set_title(kind)
        labelled = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        marks |= {label: labelled.pop(label) for label in set(labelled) - {_SUM, *(group.name for group in mine)}}
        axis.legend(labelled.values(), labelled.keys())
    for axis in axes[len(kinds) :]:
        axis.remove()
    for axis in axes[::_COLUMNS]:
        axis.set_ylabel(r"$\hat\lambda$ (±2 Monte-Carlo s.e.)")
    if marks:  # once for all panels
        named = sorted(marks)
        figure.legend([marks[label] for label in named], named, loc="outside upper center", ncols=len(named))
    stage_legend(figure, stages)
    return figure
