"""What of λ̂'s curve is the size of the weights: estimates in two units, and λ̂ over the localisation γ (docs/geometry.md)."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from icl.analysis.run_tables import keys_of, plain_text
from icl.figures.elements import (
    NO_STAGES,
    StageEnds,
    Stages,
    estimate_line,
    first_step,
    in_order,
    last_step,
    numbers,
    rows_where,
    stage_legend,
    step_axis,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, log_y, page, panels, seed_looks, shades
from icl.sampling.spectrum import Level, bands


@page()
def in_two_units(absolute: pd.DataFrame, relative: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """λ̂ of several runs at the same checkpoints, with γ in absolute units (left) and in units of each group of weights (right).

    Args:
        absolute: the columns that tell runs apart, `step`, `llc/mean`, and if known `llc/mcse`, `verdict`.
        relative: the same columns. Only its runs and steps are drawn.
        stages: the end of each stage.
    """
    figure, axes = panels(1, 2, FULL_WIDTH, 1.4 * HEIGHT, sharey=True)
    keys = [key for key in keys_of(relative) if key in keys_of(absolute)]
    told_apart = [key for key in keys if relative[key].nunique(dropna=False) > 1] or keys
    runs = pd.DataFrame(relative[keys]).drop_duplicates().sort_values(by=keys).to_dict("records")
    both = absolute.merge(pd.DataFrame(relative[[*keys, "step"]]))
    for axis, table, title in zip(axes, (both, relative), ("absolute units", "units of the weights"), strict=True):
        for run, (colour, style) in zip(runs, seed_looks(len(runs)), strict=True):
            named = (f"{key.rpartition('.')[2].removeprefix('model_')} {plain_text(run[key])}" for key in told_apart)
            label = ", ".join(named) if axis is axes[0] else None
            rows = rows_where(table, **{str(key): value for key, value in run.items()})
            estimate_line(axis, in_order(rows), label, colour, style=style, band=0.15)
        step_axis(axis, stages or StageEnds({}, first_step(stages)), last_step(relative, stages=stages))
        axis.set_title(title)
    axes[0].set_ylabel(r"$\hat\lambda$ (±2 Monte-Carlo s.e.)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(loc="upper left")
    stage_legend(figure, stages)
    return figure


@page()
def over_localisation(estimates: pd.DataFrame, curvature: pd.DataFrame) -> Figure:
    """Left: directions with nβ times curvature above γ, 2 λ̂(γ), by chains (points) and by the Hessian (lines), one colour per checkpoint.
    Right: directions per unit of log γ, the slope of the left panel. Bars and bands are ±2 standard errors.

    Args:
        estimates: one run: `step`, `gamma`, `llc/mean`, `llc/mcse`.
        curvature: the same run: `step`, `units`, `gamma`, `count`, `count/std_error`. Only relative units are drawn.
    """
    figure, (left, right) = panels(1, 2, FULL_WIDTH, 1.5 * HEIGHT, sharex=True)
    curvature = rows_where(curvature, units="relative")
    steps = sorted({int(step) for table in (estimates, curvature) for step in numbers(table, "step")})
    for step, colour in zip(steps, shades("viridis", len(steps)), strict=True):
        one = rows_where(estimates, step=step).sort_values("gamma")
        gammas, counts, errors = numbers(one, "gamma"), 2 * numbers(one, "llc/mean"), 2 * numbers(one, "llc/mcse")
        left.errorbar(gammas, counts, 2 * errors, fmt="o", ms=3, lw=1, color=colour, label=f"step {step:,}")
        found = bands([Level(*values, "") for values in zip(gammas, counts / 2, errors / 2, strict=True)])
        middle, slopes = [math.sqrt(band.low * band.high) for band in found], [band.density for band in found]
        right.errorbar(middle, slopes, [2 * band.error for band in found], fmt="o", ms=3, lw=1, color=colour)
        exact = rows_where(curvature, step=step).sort_values("gamma")
        if len(exact):
            at, count, error = (numbers(exact, name) for name in ("gamma", "count", "count/std_error"))
            left.plot(at, count, color=colour, lw=0.8)
            left.fill_between(at, count - 2 * error, count + 2 * error, color=colour, alpha=0.2, lw=0)
            right.plot(np.sqrt(at[1:] * at[:-1]), -np.diff(count) / np.diff(np.log(at)), color=colour, lw=0.8)
    left.set(ylabel=r"$2\hat\lambda(\gamma)$, directions above $\gamma$")
    right.set(ylabel="directions per unit of log γ")
    for axis in (left, right):
        axis.set(xscale="log", xlabel=r"localisation $\gamma$, units of the weights")
        log_y(axis)
    left.legend()
    return figure
