"""Geometry of the loss over training: learning coefficient per token, and the Hessian (arXiv 2402.02364, appendix
on geometry)."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.figures.elements import (
    NO_STAGES,
    Stages,
    after_start,
    in_order,
    last_step,
    stage_legend,
    step_axis,
    token_count,
    token_lines,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, MEAN, log_y, page, panels, shades


@page()
def hessian(table: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Leading eigenvalues and trace of the Hessian of the loss.

    Args:
        table: one run: `step`, `hessian/evals/0..`, `hessian/trace`, `hessian/trace_std_error`.
        stages: the end of each stage.
    """
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.9, 1.2 * HEIGHT)
    draw_hessian(axis, table)
    step_axis(axis, stages, last_step(table, stages=stages))
    stage_legend(figure, stages)
    return figure


@page()
def geometric(llc: pd.DataFrame, hessian_table: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """The learning coefficient per token and its mean, above the Hessian.

    Args:
        llc: one run: `step`, `llc/mean`, `llc/mean/k`.
        hessian_table: the same run; see `hessian`.
        stages: the end of each stage.
    """
    llc = after_start(in_order(llc))
    figure, (above, below) = panels(2, 1, FULL_WIDTH * 0.9, 2.2 * HEIGHT, sharex=True)
    token_lines(above, llc, "llc/mean")
    above.plot(llc["step"], llc["llc/mean"], color=MEAN, label="mean")
    above.set_ylabel(r"$\hat\lambda_k$ per token")
    draw_hessian(below, hessian_table)
    for axis in (above, below):
        step_axis(axis, stages, last_step(llc, hessian_table, stages=stages), names=axis is above)
    above.set_xlabel("")
    above.legend()
    stage_legend(figure, stages)
    return figure


def draw_hessian(axis: Axes, table: pd.DataFrame) -> None:
    """Draw the panel of `hessian`. The band of the trace is ±2 standard errors over random probes."""
    table = in_order(table)
    count = token_count(table, "hessian/evals")
    for i, colour in enumerate(shades("magma", count + 1)[:count]):
        axis.plot(table["step"], table[f"hessian/evals/{i}"], color=colour, label=f"eigenvalue {i + 1}")
    trace, error = table["hessian/trace"], 2 * table["hessian/trace_std_error"]
    axis.plot(table["step"], trace, color=MEAN, ls="--", label="trace (±2 s.e.)")
    axis.fill_between(table["step"], trace - error, trace + error, color=MEAN, alpha=0.2, lw=0)
    axis.set_ylabel("Hessian of the loss")
    log_y(axis)
    axis.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, 0.95))  # below the stages' names
