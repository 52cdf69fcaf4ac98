"""The developmental landscape: loss and learning coefficient over training, for one seed and for several (arXiv
2402.02364, figure 1).

λ̂ is `llc/mean`; its band is ±2 Monte-Carlo standard errors (`llc/mcse`). A cross marks an estimate of which a test of the chains failed, a
ring one for which not all tests were made (`verdict`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.analysis.curves import fitted_curves, ridge_loss
from icl.analysis.run_tables import keys_of, plain_text
from icl.figures.elements import (
    NO_STAGES,
    StageEnds,
    Stages,
    after_start,
    estimate_line,
    first_step,
    in_order,
    in_sight,
    last_step,
    mark_verdicts,
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
    seed_looks,
    shades,
)

LLC_LABEL = r"$\hat\lambda$ (±2 Monte-Carlo s.e.)"


@page()
def loss_and_llc(evals: pd.DataFrame, llc: pd.DataFrame, stages: Stages = NO_STAGES, loss: str = "loss/mean") -> Figure:
    """Test loss above, learning coefficient below, with the stages of development.

    Args:
        evals: one run: `step` and the column `loss`.
        llc: the same run: `step`, `llc/mean`, and if known `llc/mcse`, `verdict`.
        stages: the end of each stage.
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
def loss_and_llc_of_runs(
    losses: pd.DataFrame, llc: pd.DataFrame, stages: Stages = NO_STAGES, loss: str = "loss/mean"
) -> Figure:
    """Test loss and learning coefficient of several runs.

    If settings vary, each setting has a line with a band over its seeds. If only the seed varies, each `model_seed` has a line. Stages
    are not shown, because each run has its own.

    Args:
        losses: the columns that tell runs apart, `step` and the column `loss`.
        llc: the same columns, `llc/mean`, and if known `llc/mcse`, `verdict`.
        stages: only their first step is used, as the beginning of the axis.
        loss: the column of the loss.
    """
    figure, (top, bottom) = panels(2, 1, 1.5 * WIDTH, 2 * HEIGHT, sharex=True)
    settings = settings_in(llc)
    if settings:
        _lines_of_settings(top, losses, loss, settings)
        _lines_of_settings(bottom, llc, "llc/mean", settings)
        bottom.set_ylabel(r"$\hat\lambda$ (mean and range over seeds)")
    else:
        seeds = sorted(set(losses["model_seed"]) | set(llc["model_seed"]))
        for seed, (colour, style) in zip(seeds, seed_looks(len(seeds)), strict=True):
            one = in_order(rows_where(losses, model_seed=seed))
            top.plot(one["step"], one[loss], color=colour, ls=style, alpha=0.8)
            of_seed = in_order(rows_where(llc, model_seed=seed))
            estimate_line(bottom, of_seed, f"seed {seed}", colour, style=style, band=0.1)
        bottom.set_ylabel(LLC_LABEL)
    for axis in (top, bottom):
        step_axis(axis, StageEnds({}, first_step(stages)), last_step(losses))
    top.set(ylabel=r"test loss $\ell$", xlabel="")
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3 if not settings else 2)
    return figure


@page()
def loss_of_runs(metrics: pd.DataFrame, stages: Stages = NO_STAGES, loss: str = "loss/mean") -> Figure:
    """The loss of several runs during training: a line per setting with a band over its seeds, or a line per `model_seed`.

    Args:
        metrics: the columns that tell runs apart, `step` and the column `loss`.
        stages: only their first step is used, as the beginning of the axis.
        loss: the column of the loss.
    """
    figure, (axis,) = panels(1, 1, 1.5 * WIDTH, 1.5 * HEIGHT)
    _lines_of_settings(axis, metrics, loss, settings_in(metrics) or ["model_seed"])
    step_axis(axis, StageEnds({}, first_step(stages)), last_step(metrics))
    log_y(axis)
    axis.set_ylabel(r"loss $\ell$")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def settings_in(table: pd.DataFrame) -> list[str]:
    """The columns before `step` that have several values, except for the model's seed."""
    return [key for key in keys_of(table) if key != "model_seed" and table[key].nunique(dropna=False) > 1]


def _lines_of_settings(axis: Axes, table: pd.DataFrame, column: str, settings: Sequence[str]) -> None:
    """One line for each combination of settings: the mean over its seeds, with a band from the smallest to the largest value.

    The line has only steps that all seeds have. The marks of verdicts are at each seed's own value.
    """
    short = [name.rpartition(".")[2] for name in settings]
    kept = after_start(table).dropna(subset=[column])
    groups: dict[str, list[pd.DataFrame]] = {}
    for values, rows in kept.groupby([*settings], sort=True, dropna=False):
        named = zip(short, values if isinstance(values, tuple) else (values,), strict=True)
        groups.setdefault(", ".join(f"{name} {plain_text(value)}" for name, value in named), []).append(rows)
    looks = seed_looks(len(groups)) if len(groups) <= 10 else [(shade, "-") for shade in shades("viridis", len(groups))]
    for (label, parts), (colour, style) in zip(groups.items(), looks, strict=True):
        rows = pd.concat(parts)
        runs = [key for key in keys_of(table) if key not in settings]
        wide = rows.pivot_table(index="step", columns=runs, values=column) if runs else rows.set_index("step")[[column]]
        wide = pd.DataFrame(wide).dropna().sort_index()
        steps, values = wide.index.to_numpy(dtype=float), wide.to_numpy(dtype=float)
        marker = "." if len(steps) < 60 else ""
        axis.plot(steps, values.mean(axis=1), color=colour, ls=style, lw=1, marker=marker, ms=3, label=label)
        axis.fill_between(steps, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, lw=0)
    mark_verdicts(axis, kept, column, of="in a seed, ")


@page()
def llc_against_loss(llc: pd.DataFrame, evals: pd.DataFrame) -> Figure:
    """The learning coefficient as a function of the loss ℓ of its checkpoint. Below, the loss minus its optimum is on a logarithmic
    axis. There is one line per run, with bars of ±2 Monte-Carlo standard errors.

    The dashed line is λ̂ = nβ(E[L] - ℓ) for chains whose mean loss E[L] at every checkpoint is that at the first checkpoint. If
    the estimates lie on this line, λ̂ contains no more information than the loss.

    Args:
        llc: `model_seed`, `step`, `llc/mean`, `llc/mcse`, `loss/init` and `loss/mean`.
        evals: `model_seed`, `step`, `pretrain/delta_ridge`. The optimum is the loss of ridge on the same sequences
            (`icl.analysis.curves.ridge_loss`).

    Raises:
        ValueError: runs differ in more than their seeds, so that they have no common optimum and no common nβ(c - ℓ).
    """
    if settings := settings_in(llc):
        raise ValueError(
            f"the runs differ in {', '.join(settings)}, and this figure is for runs that differ in their seeds alone"
        )
    optimum = ridge_loss(llc, evals)
    figure, (top, bottom) = panels(2, 1, 1.5 * WIDTH, 2 * HEIGHT)
    losses = numbers(llc, "loss/init")
    seeds = sorted(set(llc["model_seed"]))
    for seed, (colour, style) in zip(seeds, seed_looks(len(seeds)), strict=True):
        one = in_order(rows_where(llc, model_seed=seed))
        for axis, loss in ((top, one["loss/init"]), (bottom, one["loss/init"] - optimum)):
            axis.errorbar(
                loss, one["llc/mean"], 2 * one["llc/mcse"], color=colour, ls=style, marker=".", ms=4, lw=0.8,
                elinewidth=0.6, label=f"seed {seed}",
            )  # fmt: skip
    nbeta = float((llc["llc/mean"] / (llc["loss/mean"] - llc["loss/init"])).median())
    grid = np.geomspace(losses.min() - optimum, losses.max() - optimum, 100)
    mirrored = nbeta * (float(in_order(llc)["loss/mean"].iloc[0]) - optimum - grid)
    top.plot(optimum + grid, mirrored, color="black", ls="--", lw=0.8, label=r"$n\beta\,(c - \ell)$", zorder=3)
    bottom.plot(grid, mirrored, color="black", ls="--", lw=0.8, zorder=3)
    top.set(xlabel=r"loss $\ell$ of the weights (training goes left)", ylabel=r"$\hat\lambda$")
    bottom.set(xscale="log", xlabel=rf"$\ell - {optimum:.3f}$, the loss above that of ridge", ylabel=r"$\hat\lambda$")
    top.legend()
    return figure


@page()
def behavioural_detail(evals: pd.DataFrame, llc: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Loss, λ̂ and weight norm with their Gaussian-process fits above, and the derivatives of the fits below.

    A curve that is missing or too short is left out.

    Args:
        evals: one run: `step`, `loss/mean`, `weight/norm`.
        llc: the same run: `step`, `llc/mean`, `llc/mcse`.
        stages: the end of each stage.
    """
    curves = fitted_curves(evals, llc)
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
        late = in_sight(curve, stages)
        # Scaled to the slope, because its bands are very wide at the ends of a curve.
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


def published_and_calibrated(
    llc: pd.DataFrame, calibrated: pd.DataFrame, evals: pd.DataFrame, stages: Stages = NO_STAGES
) -> Figure:
    """`settings_compared` for one run under the published and the calibrated settings."""
    zero = float(numbers(llc, "loss/zero")[0]) if "loss/zero" in llc.columns else None
    return settings_compared({"published": llc, "calibrated": calibrated}, evals, zero, stages)


@page()
def settings_compared(
    tables: Mapping[str, pd.DataFrame],
    norms: pd.DataFrame,
    zero_loss: float | None = None,
    stages: Stages = NO_STAGES,
) -> Figure:
    """λ̂ under different sampler settings, with the loss of the chains and their distance from the weights.

    If most directions are flat, the distance is about √(P/γ), whatever the loss does in the others. Compared with the norm of the
    weights, it says how large the region is to which the estimate refers.

    Args:
        tables: name of the setting -> one run's `step`, `llc/mean`, `llc/mcse`, `verdict`, `loss/init`,
            `loss/mean`, `distance`.
        norms: the same run: `step`, `weight/norm`.
        zero_loss: the loss of predicting zero. Chains above it have left the basin that they should measure.
        stages: the end of each stage.
    """
    figure, (value, loss, distance) = panels(3, 1, 1.5 * WIDTH, 3.2 * HEIGHT, sharex=True)
    looks = zip((MODEL, ZERO, OPTIMAL, MEAN), ("-", "--", "-.", ":"), strict=True)
    for (name, table), (colour, style) in zip(tables.items(), looks, strict=False):
        ordered = after_start(in_order(table))
        estimate_line(value, ordered, name, colour, style=style)
        loss.plot(ordered["step"], ordered["loss/mean"], color=colour, ls=style, label=f"chains, {name}")
        distance.plot(ordered["step"], ordered["distance"], color=colour, ls=style, label=name)
    first = after_start(in_order(next(iter(tables.values()))))
    loss.plot(first["step"], first["loss/init"], color="black", lw=0.8, label="$L(w_t)$")
    distance.plot(norms["step"], norms["weight/norm"], color="black", lw=0.8, label=r"norm $\|w_t\|$")
    if zero_loss is not None:
        loss.axhline(zero_loss, color="black", lw=0.8, ls=":", label="predicting zero")
    for axis in (value, loss, distance):
        step_axis(axis, stages, last_step(*tables.values(), stages=stages), names=axis is value)
        axis.legend()
        if axis is not distance:
            axis.set_xlabel("")
    value.set_ylabel(LLC_LABEL)
    loss.set_ylabel("loss of the chains")
    distance.set_ylabel(r"distance $\|w - w_t\|$ of the chains")
    log_y(loss)
    log_y(distance)
    stage_legend(figure, stages)
    return figure
