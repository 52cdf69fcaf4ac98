"""Attention patterns over training, per head and query token (arXiv 2402.02364, appendix on attention).

Tables are those of `icl.analysis.attention.attention_table`, one run, with a column `step`: `block`, `head`,
`token` (0-based) and one column per metric. Even tokens are x, odd ones y.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.figures.elements import NO_STAGES, Stages, in_order, last_step, numbers, rows_where, step_axis
from icl.figures.style import FULL_WIDTH, HEIGHT, page, panels, shades

METRICS = {
    "entropy": "entropy (bits)",
    "entropy_normalized": "entropy / entropy of uniform attention",
    "variability": "variability (total variation to the mean pattern)",
    "self_attn": "attention to itself",
    "prev_token_attn": "attention to the previous token",
    "first_token_attn": "attention to the first x",
    "prev_x_attn": "attention to the previous x",
    "prev_y_attn": "attention to the previous y",
    "x_tokens_attn": "attention to x tokens",
    "distance": "mean distance (tokens)",
    "key_position": "mean key position / (q + 1)",
    "hardness": "share of keys below 0.001",
}
_IDENTIFYING = ("self_attn", "prev_token_attn", "prev_y_attn", "first_token_attn", "x_tokens_attn")
_IDENTIFIED_FROM = 0.6


class Role(NamedTuple):
    """The metric that describes a head for one kind of query. Block and head count from 0, and `kind` is "x" or "y"."""

    block: int
    head: int
    kind: str
    metric: str


@page()
def attention_metric(table: pd.DataFrame, metric: str, stages: Stages = NO_STAGES) -> Figure:
    """One metric of the attention patterns. Each block has a row of panels for x queries and one for y queries. There is a column
    for each head and a line for each query.

    Raises:
        ValueError: the table does not have this metric.
    """
    if metric not in table.columns:
        raise ValueError(
            f"there is no metric {metric!r}; known: {', '.join(name for name in METRICS if name in table.columns)}"
        )
    table = in_order(table)
    blocks, heads = (int(numbers(table, name).max()) + 1 for name in ("block", "head"))
    figure, axes = panels(2 * blocks, heads, FULL_WIDTH * 1.2, 0.8 * HEIGHT * 2 * blocks, sharex=True, sharey=True)
    figure.suptitle(METRICS.get(metric, metric))
    for index, axis in enumerate(axes):
        row, head = divmod(index, heads)
        block, kind = row // 2, "xy"[row % 2]
        _queries(axis, table, Role(block, head, kind, metric))
        axis.set_title(f"block {block + 1}, head {head + 1}, {kind} queries", fontsize=7)
        step_axis(axis, stages, last_step(table, stages=stages), names=False)
        if row < 2 * blocks - 1:
            axis.set_xlabel("")
    _token_legend(figure, [axes[0], axes[heads]])
    return figure


@page()
def identified_heads(table: pd.DataFrame, roles: Sequence[Role] | None = None, stages: Stages = NO_STAGES) -> Figure:
    """One panel for each head with an identified role, showing the metric of that role; see `find_roles`.

    Raises:
        ValueError: no head has a role.
    """
    table = in_order(table)
    chosen = find_roles(table) if roles is None else list(roles)
    if not chosen:
        raise ValueError(f"no head gives a kind of token more than {_IDENTIFIED_FROM:.0%} of its attention")
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = panels(rows, columns, FULL_WIDTH * 1.2, 1.1 * HEIGHT * rows, sharey=True)
    for axis, role in zip(axes, chosen, strict=False):
        _queries(axis, table, role)
        title = f"b{role.block + 1}h{role.head + 1}, {role.kind} queries:\n{METRICS[role.metric]}"
        axis.set_title(title, fontsize=7)
        step_axis(axis, stages, last_step(table, stages=stages), names=False)
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    kinds = {role.kind: axis for axis, role in zip(axes, chosen, strict=False)}
    _token_legend(figure, [kinds[kind] for kind in "xy" if kind in kinds])
    return figure


def find_roles(table: pd.DataFrame) -> list[Role]:
    """The roles of heads: for every block, head and kind of query, the kind of token that gets more than 60 % of its attention at
    the last step.

    Attention to x tokens is first rescaled, so that 0 is the share under a uniform pattern and 1 is all attention.
    """
    final = table.loc[((table["step"] == table["step"].max()) & (table["token"] > 1)).to_numpy()].copy()
    visible_x = final["token"] // 2 + 1
    uniform = visible_x / (final["token"] + 1)
    final["x_tokens_attn"] = (final["x_tokens_attn"] - uniform) / (1 - uniform)
    final["kind"] = np.where(numbers(final, "token") % 2 == 0, "x", "y")
    metrics = [name for name in _IDENTIFYING if name in final.columns]
    means = final.groupby(["block", "head", "kind"])[metrics].mean()
    roles = []
    for (block, head, kind), row in means.iterrows():  # type: ignore[misc]
        if row.max() > _IDENTIFIED_FROM:
            roles.append(Role(int(block), int(head), str(kind), str(row.idxmax())))
    return roles


def _token_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """A legend of the lines in these panels, with one name per query token."""
    lines = [line for axis in axes for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    figure.legend(handles=lines, loc="outside lower center", ncols=8)


def _queries(axis: Axes, table: pd.DataFrame, role: Role) -> None:
    """One line per query token (viridis for x, magma for y), and a line at zero."""
    parity = 0 if role.kind == "x" else 1
    mine = rows_where(table.assign(parity=table["token"] % 2), parity=parity, block=role.block, head=role.head)
    tokens = sorted(set(mine["token"]))
    for token, colour in zip(tokens, shades("viridis" if parity == 0 else "magma", len(tokens)), strict=True):
        one = rows_where(mine, token=token)
        axis.plot(one["step"], one[role.metric], color=colour, lw=0.8, label=f"${role.kind}_{token // 2 + 1}$")
    axis.axhline(0, color="black", lw=0.4)
