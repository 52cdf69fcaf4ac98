"""Figures of sampling chains: traces, estimates under several settings of the sampler, draws in principal components."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from icl.analysis.climb import crossing_draws, estimates_within
from icl.analysis.run_tables import keys_of, plain_text
from icl.figures.elements import (
    NO_STAGES,
    Stages,
    after_start,
    estimate_line,
    first_step,
    in_order,
    last_step,
    legend_below,
    mark_verdicts,
    numbers,
    rows_where,
    step_axis,
    step_colours,
    token_count,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, MODEL, WIDTH, ZERO, log_y, page, panels, seed_looks, shades


@page()
def loss_trace(traces: pd.DataFrame, init_loss: float | None = None) -> Figure:
    """The loss of each chain (left axis), and the running estimate of λ̂ as mean over chains ±2 standard errors (right axis).

    Args:
        traces: one row per `chain`, `draw`: `loss`, and `llc`, the chain's estimate from its draws so far.
        init_loss: L(w*), shown as a dashed line.
    """
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.8, 1.3 * HEIGHT)
    chains = sorted(set(traces["chain"]))
    for chain, colour in zip(chains, shades("viridis", len(chains)), strict=True):
        one = rows_where(traces, chain=chain).sort_values("draw")
        axis.plot(one["draw"], one["loss"], color=colour, lw=0.4, alpha=0.7)
    if init_loss is not None:
        axis.axhline(init_loss, color="black", ls="--", lw=0.8, label=r"$L(w^*)$")
        axis.legend(loc="upper left")
    axis.set(xlabel=r"draw $\tau$", ylabel="loss of each chain")
    estimates = traces.groupby("draw")["llc"].agg(["mean", "sem"])
    right = axis.twinx()
    right.spines["right"].set_visible(True)
    right.plot(estimates.index, estimates["mean"], color="black")
    low, high = estimates["mean"] - 2 * estimates["sem"], estimates["mean"] + 2 * estimates["sem"]
    right.fill_between(estimates.index, low, high, color="black", alpha=0.15, lw=0)
    right.set_ylabel(r"running $\hat\lambda$ (±2 s.e. over chains)")
    return figure


@page()
def relaxation(traces: pd.DataFrame, estimates: pd.DataFrame) -> Figure:
    """How the chains leave each checkpoint: their loss and distance over the draws, as mean over chains, one line per checkpoint.

    The dotted line is the loss of predicting 0. A chain above it is no longer near a useful model.

    Args:
        traces: one run, one row per `step`, `chain` and `draw`: `loss` (mean since the draw of the row before), `distance`.
        estimates: the same run: `step`, and if known `loss/zero`.
    """
    figure, axes = panels(1, 2, FULL_WIDTH, 1.6 * HEIGHT)
    steps = sorted({int(step) for step in numbers(traces, "step")})
    colours, shown = step_colours(steps)
    for axis, column in zip(axes, ("loss", "distance"), strict=True):
        for step in steps:
            # With the draws at which all chains are lost.
            mean = rows_where(traces, step=step).pivot_table(index="draw", values=column, dropna=False)
            axis.plot(mean.index, numbers(mean, column), color=colours[step], lw=0.8)
        axis.set(xscale="log", xlabel=r"draw $\tau$")
        log_y(axis)
    axes[0].set_ylabel("loss of the chains")
    if "loss/zero" in estimates.columns:
        axes[0].axhline(numbers(estimates, "loss/zero")[0], color="black", ls=":", lw=0.9, label="predicting zero")
        axes[0].legend(loc="lower right")
    axes[1].set_ylabel(r"distance $\|w - w_t\|$")
    figure.colorbar(shown, ax=axes, label="training step $t$")
    return figure


@page()
def climbs(traces: pd.DataFrame, estimates: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """How long the loss of the chains climbs, and how this changes λ̂. Each run has a colour.

    Above: the draw at which each chain first does worse than predicting zero (`icl.analysis.climb`), or a triangle at the last draw if it
    never does; and the median draw at which chains are half way there. Below: λ̂ from all draws and from the second half of them, from
    half the end of the second stage on.

    Args:
        traces: the columns that tell runs apart, such as `model_seed`, then `step`, `chain`, `draw`, `loss`.
        estimates: the same columns, `step`, `llc/mean`, `loss/init`, `loss/excess`, `loss/zero`.
        stages: the end of each stage.
    """
    figure, (climb, value) = panels(2, 1, 1.5 * WIDTH, 2.4 * HEIGHT, sharex=True)
    keys = keys_of(estimates)
    traces, estimates = _with_names_of_runs(traces, keys), _with_names_of_runs(estimates, keys)
    worse, half_way = (crossing_draws(traces, estimates, fraction) for fraction in (1.0, 0.5))
    late = estimates_within(traces, estimates)
    final = float(numbers(traces, "draw").max())
    runs = list(dict.fromkeys(estimates["model_seed"]))
    for i, (run, (colour, _)) in enumerate(zip(runs, seed_looks(len(runs)), strict=True)):
        mine = rows_where(worse, model_seed=run)
        beside = numbers(mine, "step") * 1.03 ** (i - (len(runs) - 1) / 2)
        never = mine["crossing"].isna().to_numpy()
        climb.plot(beside[~never], mine.loc[~never, "crossing"], ".", ms=3, color=colour)
        climb.plot(beside[never], np.full(never.sum(), final), "^", ms=4, mfc="none", mew=0.7, color=colour)
        middle = rows_where(half_way, model_seed=run).groupby("step")["crossing"].median()
        climb.plot(middle.index, middle.to_numpy(), color=colour, ls="--", lw=0.8)
        whole, half = (in_order(after_start(rows_where(table, model_seed=run))) for table in (estimates, late))
        whole, half = (table.loc[numbers(table, "step") >= 0.5 * stages.get("LR2", 0)] for table in (whole, half))
        value.plot(whole["step"], whole["llc/mean"], color=colour, lw=1, marker=".", ms=3, label=run)
        error = 2 * half["llc/mcse"]
        value.errorbar(half["step"], half["llc/mean"], error, color=colour, ls=":", lw=0.9, elinewidth=0.6)
    log_y(climb)
    climb.set_ylim(top=2 * final)
    climb.set_ylabel("draw")
    value.set_ylabel(r"$\hat\lambda$")
    for axis in (climb, value):
        step_axis(axis, stages, last_step(estimates, stages=stages), first=10 * first_step(stages), names=axis is climb)
    climb.set_xlabel("")
    for marker, filled, style, text in (
        (".", "black", "", "a chain is worse than predicting zero"),
        ("^", "none", "", "it never is"),
        ("", "none", "--", "chains are half way (median)"),
    ):
        climb.plot([], [], color="black", marker=marker, mfc=filled, ls=style, ms=4, lw=0.8, label=text)
    climb.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
    for style, text in (("-", "all draws"), (":", "second half of the draws, ±2 s.e. over chains")):
        value.plot([], [], color="black", ls=style, lw=1, label=text)
    figure.legend(*value.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _with_names_of_runs(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The table with the name of each run as its `model_seed`, such as `seed 0` or `seed 0, lr 0.01`. The seed alone does not tell
    runs of several settings apart."""
    short = {key: key.rpartition(".")[2].removeprefix("model_") for key in keys}
    rows = table[list(short)].itertuples(index=False, name=None)
    names = [
        ", ".join(f"{key} {plain_text(value)}" for key, value in zip(short.values(), row, strict=True)) for row in rows
    ]
    return table.assign(model_seed=names)


@page()
def running_estimates(
    table: pd.DataFrame,
    columns: str,
    hue: str,
    rows: str | None = None,
    value: str = "llc/mean",
    levels: Mapping[str, float] | None = None,
    limits: tuple[float, float] | None = None,
    log: bool = False,
) -> Figure:
    """Running estimates over the draws, as a grid of panels: one panel per setting, one line per value of `hue`.

    Args:
        table: one row per cell and draw: `draw`, the column `value`, the columns named below, and if known `llc/mcse` for bands of ±2
            standard errors, and `verdict`, which is marked at the last draw with a finite value.
        columns: the column of the table whose values give the columns of the grid.
        hue: the column of the table whose values give the lines.
        rows: the column of the table whose values give the rows of the grid; None for a single row.
        value: the column that is drawn.
        levels: heights of horizontal lines, by their names in the legend.
        limits: of the axis of values. A line that leaves it has a triangle at the upper edge, at its last draw with a finite value.
        log: whether this axis is logarithmic.
    """
    table = table if rows is not None else table.assign(_row=0)
    across, down, lines = (sorted(set(table[name])) for name in (columns, rows or "_row", hue))
    figure, axes = panels(
        len(down), len(across), FULL_WIDTH * 1.2, HEIGHT * 0.9 * len(down) + 0.3, sharex=True, sharey=True
    )
    for index, axis in enumerate(axes):
        row, column = down[index // len(across)], across[index % len(across)]
        cell = rows_where(table, **{columns: column, rows or "_row": row})
        for name, colour in zip(lines, shades("viridis", len(lines)), strict=True):
            one = rows_where(cell, **{hue: name}).sort_values("draw")
            axis.plot(one["draw"], one[value], color=colour, lw=0.8, label=_short(hue, name))
            if "llc/mcse" in table.columns and value == "llc/mean":
                low, high = one[value] - 2 * one["llc/mcse"], one[value] + 2 * one["llc/mcse"]
                axis.fill_between(one["draw"], low, high, color=colour, alpha=0.15, lw=0)
            last = one.dropna(subset=[value]).tail(1)
            if limits is not None and (last[value] > limits[1]).any():
                axis.plot(last["draw"], limits[1], "^", color=colour, ms=4, clip_on=False, label="left the panel")
            else:
                mark_verdicts(axis, last, value, at="draw")
        for (text, height), style in zip((levels or {}).items(), ("--", ":"), strict=False):
            axis.axhline(height, color="black", ls=style, lw=0.7, label=text)
        title = _short(columns, column) + (f", {_short(rows, row)}" if rows is not None else "")
        axis.set_title(title, fontsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        if log:
            log_y(axis)
        if limits is not None:
            axis.set_ylim(limits)
        if index % len(across) == 0:
            axis.set_ylabel(r"$\hat\lambda(\tau)$" if value == "llc/mean" else value)
        if index >= len(axes) - len(across):
            axis.set_xlabel(r"draw $\tau$")
    legend_below(figure, axes)
    return figure


@page()
def estimates_by_setting(table: pd.DataFrame, setting: str, stages: Stages = NO_STAGES) -> Figure:
    """λ̂ over the training steps, one line per value of a sampler's setting, with bands of ±2 standard errors.

    Args:
        table: one row per setting and checkpoint: `step`, `setting`, `llc/mean`, `llc/mcse`, `verdict`.
        setting: the column, such as "eval_dataset_size".
        stages: the end of each stage.
    """
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.95, 1.4 * HEIGHT)
    values = sorted(set(table[setting]))
    for value, colour in zip(values, shades("viridis", len(values)), strict=True):
        estimate_line(axis, in_order(rows_where(table, **{setting: value})), _short(setting, value), colour)
    step_axis(axis, stages, last_step(table, stages=stages))
    axis.set_ylabel(r"$\hat\lambda$ (±2 Monte-Carlo s.e.)")
    axis.legend(ncols=2)
    return figure


@page()
def sampling_seed(fixed: pd.DataFrame, fresh: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """λ̂ per token, with one sampling seed for all checkpoints (thick) and with a new seed at each (thin).

    The noise of estimates with one shared seed is correlated between checkpoints, so their curve looks too smooth. Verdicts are
    marked on the line of the last token.

    Args:
        fixed, fresh: `step`, `llc/mean/k`, and if known `verdict`, for one seed and for new seeds.
        stages: the end of each stage.
    """
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.9, 1.3 * HEIGHT)
    count = token_count(fixed, "llc/mean")
    for k, colour in enumerate(shades("viridis", count)):
        for table, width, alpha, kind in ((fixed, 2.0, 0.5, "one seed"), (fresh, 0.7, 1.0, "fresh seeds")):
            ordered = in_order(table)
            label = f"$k={k + 1}$, {kind}" if k in (0, count - 1) else None
            axis.plot(ordered["step"], ordered[f"llc/mean/{k}"], color=colour, lw=width, alpha=alpha, label=label)
    for table in (fixed, fresh):
        mark_verdicts(axis, table, f"llc/mean/{count - 1}")
    step_axis(axis, stages, last_step(fixed, fresh, stages=stages))
    axis.set_ylabel(r"$\hat\lambda_k$")
    axis.legend(ncols=2)
    return figure


@page()
def weight_planes(
    draws: pd.DataFrame,
    variance: ArrayLike,
    landscapes: Mapping[tuple[int, int], tuple[ArrayLike, ArrayLike, ArrayLike]] | None = None,
) -> Figure:
    """Draws of the chains in planes of principal components of w - w*, and the explained variance.

    The background is the loss in the plane, if it was computed.

    Args:
        draws: one row per `chain`, `draw`: `pc/0`, `pc/1`, ...
        variance: (V,) explained shares.
        landscapes: plane (i, j) -> x (n,), y (m,) and loss (m, n) on that grid.
    """
    count = token_count(draws, "pc")
    pairs = [(i, j) for j in range(count) for i in range(j)]
    figure, axes = panels(1, len(pairs) + 1, FULL_WIDTH * (len(pairs) + 1) / 3, 1.4 * HEIGHT)
    chains = sorted(set(draws["chain"]))
    for axis, (i, j) in zip(axes, pairs, strict=False):
        if landscapes is not None and (i, j) in landscapes:
            x, y, loss = (np.asarray(part, dtype=float) for part in landscapes[i, j])
            # On a logarithmic scale, both the bottom and the walls of the basin are visible.
            shown = np.log(1e-3 + (loss - loss.min()) / max(float(np.ptp(loss)), 1e-12))
            extent = (x[0], x[-1], y[0], y[-1])
            axis.imshow(shown, cmap="Blues", origin="lower", extent=extent, aspect="auto", interpolation="bilinear")
        for chain, colour in zip(chains, shades("viridis", len(chains)), strict=True):
            one = rows_where(draws, chain=chain)
            axis.scatter(numbers(one, f"pc/{i}"), numbers(one, f"pc/{j}"), s=2, color=[colour], lw=0)
        axis.plot(0, 0, "+", color=ZERO, ms=7)
        axis.set(xlabel=f"PC {i + 1}", ylabel=f"PC {j + 1}")
    shares = np.asarray(variance, dtype=float)
    bars = axes[-1].bar(np.arange(len(shares)) + 1, shares, color=MODEL)
    axes[-1].bar_label(bars, fmt="%.2f", fontsize=6)
    axes[-1].set(xlabel="component", ylabel="explained variance", ylim=(0, 1.2 * float(shares.max())))
    return figure


def _short(name: str | None, value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int | np.integer) else value
    return f"{str(name).replace('_', ' ')} {text}"
