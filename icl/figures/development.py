"""The developmental landscape: loss and learning coefficient over training, for one seed and for several (arXiv
2402.02364, figure 1).

λ̂ is `llc/mean`; its band is ±2 Monte-Carlo standard errors over chains (`llc/mcse`), and a grey cross marks an
estimate whose own diagnostics say not to trust it (`verdict`).
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.figures.elements import (
    Stages,
    estimate_line,
    in_order,
    last_step,
    numbers,
    rows_where,
    stage_legend,
    step_axis,
)
from icl.figures.style import (
    FULL_HEIGHT,
    FULL_WIDTH,
    HEIGHT,
    MEAN,
    MODEL,
    OPTIMAL,
    WIDTH,
    ZERO,
    log_y,
    page,
    panels,
    shades,
)

LLC_LABEL = r"$\hat\lambda$ (±2 s.e. over chains)"


@page()
def loss_and_llc(
    evals: pd.DataFrame, llc: pd.DataFrame, stages: Stages = PUBLISHED_STAGE_ENDS, loss: str = "loss/mean"
) -> Figure:
    """Test loss above, learning coefficient below, with the stages of development.

    Args:
        evals: one run: `step` and the column `loss`.
        llc: the same run: `step`, `llc/mean`, and where known `llc/mcse`, `verdict`.
        stages: their ends.
        loss: the column of the loss.
    """
    evals, llc = in_order(evals), in_order(llc)
    figure, (top, bottom) = panels(2, 1, 1.5 * WIDTH, 2 * HEIGHT, sharex=True)
    end = last_step(evals, stages=stages)
    for axis in (top, bottom):
        step_axis(axis, stages, end, names=axis is top)
    top.plot(evals["step"], evals[loss], color=MODEL)
    top.set(ylabel=r"test loss $\ell$", xlabel="")
    estimate_line(bottom, llc, "estimate")
    bottom.set_ylabel(LLC_LABEL)
    bottom.legend(loc="upper left")
    stage_legend(figure, stages)
    return figure


@page()
def loss_and_llc_of_seeds(evals: pd.DataFrame, llc: pd.DataFrame, loss: str = "loss/mean") -> Figure:
    """The same two panels with one line per `model_seed`, and without stages, whose boundaries are one seed's."""
    figure, (top, bottom) = panels(2, 1, 1.5 * WIDTH, 2 * HEIGHT, sharex=True)
    seeds = sorted(set(evals["model_seed"]) | set(llc["model_seed"]))
    for seed, colour in zip(seeds, shades("viridis", len(seeds)), strict=True):
        one = in_order(rows_where(evals, model_seed=seed))
        top.plot(one["step"], one[loss], color=colour, label=f"seed {seed}", alpha=0.8)
        estimate_line(bottom, in_order(rows_where(llc, model_seed=seed)), colour=colour)
    for axis in (top, bottom):
        step_axis(axis, {}, last_step(evals, stages={}))
    top.set(ylabel=r"test loss $\ell$", xlabel="")
    top.legend()
    bottom.set_ylabel(LLC_LABEL)
    return figure


@page()
def llc_against_loss(llc: pd.DataFrame, floor: float | None = None) -> Figure:
    """The learning coefficient against the loss of the weights it belongs to, and against that loss above a floor on a
    logarithmic axis; one line per `model_seed`.

    The dashed line is what λ̂ = nβ(E[L] - ℓ) would be if the chains went everywhere to the same loss E[L], that of the
    first checkpoint: on it λ̂ says nothing that the loss does not say.

    Args:
        llc: `model_seed`, `step`, `llc/mean`, `loss/init` and `loss/mean`.
        floor: subtracted from the loss in the lower panel, such as the loss of ridge on the same sequences; None
            takes 1 % of the loss's range below its smallest value.
    """
    figure, (top, bottom) = panels(2, 1, 1.5 * WIDTH, 2 * HEIGHT)
    losses = numbers(llc, "loss/init")
    base = losses.min() - 0.01 * (losses.max() - losses.min()) if floor is None else floor
    seeds = sorted(set(llc["model_seed"]))
    for seed, colour in zip(seeds, shades("viridis", len(seeds)), strict=True):
        one = in_order(rows_where(llc, model_seed=seed))
        top.plot(one["loss/init"], one["llc/mean"], color=colour, marker=".", ms=4, lw=0.8, label=f"seed {seed}")
        above = one[one["loss/init"] > base]
        bottom.plot(above["loss/init"] - base, above["llc/mean"], color=colour, marker=".", ms=4, lw=0.8)
    nbeta = float((llc["llc/mean"] / (llc["loss/mean"] - llc["loss/init"])).median())
    grid = np.geomspace(losses.min() - base, losses.max() - base, 100)
    mirrored = nbeta * (float(in_order(llc)["loss/mean"].iloc[0]) - base - grid)
    top.plot(base + grid, mirrored, color="black", ls="--", lw=0.8, label=r"$n\beta\,(c - \ell)$", zorder=3)
    bottom.plot(grid, mirrored, color="black", ls="--", lw=0.8, zorder=3)
    top.set(xlabel=r"loss $\ell$ of the weights (training goes left)", ylabel=r"$\hat\lambda$")
    bottom.set(xscale="log", xlabel=rf"$\ell - {base:.3f}$", ylabel=r"$\hat\lambda$")
    top.legend()
    return figure


@page()
def behavioural_detail(curves: Mapping[str, pd.DataFrame], stages: Stages = PUBLISHED_STAGE_ENDS) -> Figure:
    """Loss, λ̂ and weight norm above, their derivatives below, with the Gaussian-process fit and its derivative.

    Args:
        curves: "loss", "llc", "norm" -> tables of `icl.analysis.gaussian_process.smooth_curve`: `step`, `value`,
            `spline`, `spline_std`,
            `d_dlogt`, `d_dlogt_std`, `d_dt`. A curve that is missing leaves its two panels out.
        stages: their ends.
    """
    labels = {"loss": r"test loss $\ell$", "llc": r"$\hat\lambda$", "norm": r"weight norm $\|w\|$"}
    shown = {name: in_order(curves[name]) for name in labels if name in curves}
    figure, axes = panels(2, len(shown), FULL_WIDTH * len(shown) / 3 * 1.1, FULL_HEIGHT)
    for column, (name, curve) in enumerate(shown.items()):
        above, below = axes[column], axes[len(shown) + column]
        _fit(above, curve, "value", "spline", "spline_std")
        above.set_ylabel(labels[name])
        if name != "llc":
            log_y(above)
        _fit(below, curve, None, "d_dlogt", "d_dlogt_std")
        below.axhline(0, color="black", lw=0.5)
        below.set_ylabel(rf"$d/d\log t$ of {labels[name].split(' ')[-1]}")
        late = curve.loc[numbers(curve, "step") >= 100]
        # The bands at the ends of a curve are wide: the scale is that of the slope.
        low, high = min(0.0, numbers(late, "d_dlogt").min()), max(0.0, numbers(late, "d_dlogt").max())
        below.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
        for axis in (above, below):
            step_axis(axis, stages, last_step(*shown.values(), stages=stages), names=axis is above)
    axes[0].legend()
    stage_legend(figure, stages)
    return figure


def _fit(axis: Axes, curve: pd.DataFrame, raw: str | None, mean: str, deviation: str) -> None:
    if raw is not None:
        axis.plot(curve["step"], curve[raw], color=MODEL, alpha=0.35, label="measured")
    axis.plot(curve["step"], curve[mean], color=MEAN, ls="--", lw=0.9, label="fit (±2 s.d.)")
    low, high = curve[mean] - 2 * curve[deviation], curve[mean] + 2 * curve[deviation]
    axis.fill_between(curve["step"], low, high, color=MEAN, alpha=0.2, lw=0)


@page()
def settings_compared(
    tables: Mapping[str, pd.DataFrame], zero_loss: float | None = None, stages: Stages = PUBLISHED_STAGE_ENDS
) -> Figure:
    """λ̂ under different sampler settings, and what tells them apart: the loss of the chains and how far they went.

    Args:
        tables: name of the setting -> one run's `step`, `llc/mean`, `llc/mcse`, `verdict`, `loss/init`,
            `loss/mean`, `distance`.
        zero_loss: the loss of predicting zero; chains above it have left the basin of the weights that they are
            meant to measure.
        stages: their ends.
    """
    figure, (value, loss, distance) = panels(3, 1, 1.5 * WIDTH, 3.2 * HEIGHT, sharex=True)
    looks = zip((MODEL, ZERO, OPTIMAL, MEAN), ("-", "--", "-.", ":"), strict=True)
    for (name, table), (colour, style) in zip(tables.items(), looks, strict=False):
        ordered = in_order(table)
        estimate_line(value, ordered, name, colour, style=style)
        loss.plot(ordered["step"], ordered["loss/mean"], color=colour, ls=style, label=f"chains, {name}")
        distance.plot(ordered["step"], ordered["distance"], color=colour, ls=style, label=name)
    first = in_order(next(iter(tables.values())))
    loss.plot(first["step"], first["loss/init"], color="black", lw=0.8, label="$L(w_t)$")
    if zero_loss is not None:
        loss.axhline(zero_loss, color="black", lw=0.8, ls=":", label="predicting zero")
    for axis in (value, loss, distance):
        step_axis(axis, stages, last_step(*tables.values(), stages=stages), names=axis is value)
        axis.legend()
        if axis is not distance:
            axis.set_xlabel("")
    value.set_ylabel(LLC_LABEL)
    loss.set_ylabel("loss of the chains")
    distance.set_ylabel(r"distance $\|w - w_t\|$")
    log_y(loss)
    log_y(distance)
    stage_legend(figure, stages)
    return figure
