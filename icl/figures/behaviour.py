"""The model's behaviour over training: task prior, losses per example, in-context learning, robustness (arXiv 2402.02364,
appendix on behaviour).

In-context learning scores have the paper's sign, ICL_{k1:k2} = ℓ_{k1} - ℓ_{k2}: higher means more in-context learning. Scores
on inputs multiplied by g are divided by g², because a squared loss grows like g². So different g can be compared.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from icl.figures.elements import (
    NO_STAGES,
    Stages,
    in_order,
    in_sight,
    last_step,
    numbers,
    stage_legend,
    step_axis,
    token_count,
    token_lines,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, MEAN, MODEL, ZERO, log_y, page, panels, shades


@page()
def behavioural(evals: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Distance to the task prior's prediction 0 per example, and in-context learning scores on ordinary and large inputs.

    A dip of the distance marks the end of the first stage.

    Args:
        evals: one run: `step`, `loss_0/k`, `loss_0/mean`, `icl/1:K`, `ood_g_inputs_icl` for some gains g.
        stages: the end of each stage.
    """
    evals = in_order(evals)
    figure, (prior, score) = panels(2, 1, FULL_WIDTH * 0.8, 2 * HEIGHT, sharex=True)
    token_lines(prior, evals, "loss_0")
    prior.plot(evals["step"], evals["loss_0/mean"], color=MEAN, label="mean")
    prior.set_ylabel(r"$\hat y_k^2$, distance to predicting 0")
    log_y(prior)
    count = token_count(evals, "loss")
    scores = {"1": evals[f"icl/1:{count}"]}
    gains = sorted(
        (name.split("_")[1] for name in evals.columns if name.startswith("ood_") and name.endswith("_inputs_icl")),
        key=float,
    )
    scores |= {gain: evals[f"ood_{gain}_inputs_icl"] for gain in gains}
    for (gain, values), colour in zip(scores.items(), shades("magma", len(scores)), strict=True):
        score.plot(evals["step"], values, color=colour, label=f"$g={gain}$")
    late = in_sight(evals, stages)
    # Early models give wild predictions on large inputs, so the axis is scaled to ordinary inputs.
    reach = max(float(np.abs(numbers(late, f"icl/1:{count}")).max()), 0.1)
    lowest = min(float(np.nanmin(values[late.index])) for values in scores.values())
    score.set_ylim(max(-1.5 * reach, min(1.1 * lowest, -0.1 * reach)), 1.3 * reach)
    score.axhline(0, color="black", lw=0.5)
    score.set_ylabel(rf"$(\ell_1 - \ell_{count}) / g^2$, up is more ICL")
    for axis in (prior, score):
        step_axis(axis, stages, last_step(evals, stages=stages), names=axis is prior)
    prior.legend(ncols=2)
    prior.set_xlabel("")
    score.legend(title=r"inputs $g\,x$", ncols=2)
    stage_legend(figure, stages)
    return figure


@page()
def prior_distance(table: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Distance of the predictions to those of the prior's mean, for one run. A dot marks the minimum.

    Args:
        table: `step`, `task_prior/zero`, `task_prior/mean_task`. For Gaussian tasks the two are equal, and the second is left out.
        stages: the end of each stage.
    """
    table = in_order(table)
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.8, 1.3 * HEIGHT)
    titles = {"task_prior/zero": "to predicting 0", "task_prior/mean_task": "to the mean task"}
    for (column, title), colour in zip(titles.items(), (MODEL, ZERO), strict=True):
        if column != "task_prior/zero" and np.array_equal(table[column], table["task_prior/zero"]):
            continue
        axis.plot(table["step"], table[column], color=colour, label=title)
        lowest = table.loc[table[column].idxmin()]
        axis.plot(lowest["step"], lowest[column], "o", ms=4, color=colour)
    axis.set_ylabel(r"$\mathrm{E}\,\Sigma_k\,(\hat y_k - p_k)^2$")
    log_y(axis)
    step_axis(axis, stages, last_step(table, stages=stages))
    axis.legend()
    stage_legend(figure, stages)
    return figure


@page()
def icl_scores(evals: pd.DataFrame, stages: Stages = NO_STAGES, zoom: tuple[float, float] | None = None) -> Figure:
    """Early and late in-context learning scores, ICL_{1:K/2} and ICL_{K/2:K}, over the whole training and around its onset.

    Args:
        evals: one run: `step` and `loss/k`.
        stages: the end of each stage.
        zoom: the steps of the second panel, shown as a dashed box in the first. None: the paper's steps, or for a shorter run
            the last factor of ten.
    """
    end = last_step(evals, stages=stages)
    zoom = zoom or ((1_000, 10_000) if end > 20_000 else (max(end / 10, 1), end))
    evals = in_order(evals)
    count = token_count(evals, "loss")
    half = max(1, count // 2)
    pairs = {(1, half): (MODEL, "-"), (half, count): (ZERO, "--")}
    figure, (whole, onset) = panels(1, 2, FULL_WIDTH, 1.3 * HEIGHT)
    for axis in (whole, onset):
        for (first, last), (colour, style) in pairs.items():
            values = evals[f"loss/{first - 1}"] - evals[f"loss/{last - 1}"]
            axis.plot(evals["step"], values, style, color=colour, label=rf"$\ell_{first}-\ell_{last}$")
        axis.axhline(0, color="black", lw=0.5)
        axis.set_ylabel("score, up is more ICL")
    step_axis(whole, stages, end)
    step_axis(onset, stages, zoom[1], zoom[0])
    low, high = whole.get_ylim()
    height = 0.92 * (high - low)  # below the stages' names
    box = Rectangle((zoom[0], low), zoom[1] - zoom[0], height, fill=False, ls="--", lw=0.8)
    whole.add_patch(box)
    whole.legend(loc="upper left", bbox_to_anchor=(0, 0.94))  # below the stages' names
    stage_legend(figure, stages)
    return figure


@page()
def token_losses(evals: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Loss per example, and loss out of distribution: on inputs and tasks multiplied by g.

    Args:
        evals: one run: `step`, `loss/k`, `loss/mean`, `ood_g_inputs_loss/mean`, `ood_g_tasks_loss/mean`.
        stages: the end of each stage.
    """
    evals = in_order(evals)
    figure, axes = panels(1, 3, FULL_WIDTH, 1.4 * HEIGHT)
    token_lines(axes[0], evals, "loss")
    axes[0].plot(evals["step"], evals["loss/mean"], color=MEAN, label="mean")
    axes[0].set(title="loss per example", ylabel="mean squared error")
    for axis, kind in zip(axes[1:], ("inputs", "tasks"), strict=True):
        gains = sorted((name.split("_")[1] for name in evals.columns if name.endswith(f"_{kind}_loss/mean")), key=float)
        for gain, colour in zip(gains, shades("magma", len(gains)), strict=True):
            values = evals[f"ood_{gain}_{kind}_loss/mean"] / float(gain) ** 2
            axis.plot(evals["step"], values, color=colour, label=f"$g={gain}$")
        axis.set(title=f"{kind} $g$ times too large", ylabel="loss / $g^2$")
    for axis in axes:
        step_axis(axis, stages, last_step(evals, stages=stages), names=axis is axes[0])
        log_y(axis)
        axis.legend()
    stage_legend(figure, stages)
    return figure


@page()
def distance_to_optimum(evals: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Mean squared distance of the predictions to those of ridge, per example.

    Args:
        evals: one run: `step`, `pretrain/delta_ridge`, `pretrain/delta_ridge/token/k`.
        stages: the end of each stage.
    """
    evals = in_order(evals)
    token_count(evals, "pretrain/delta_ridge/token")
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.7, 1.4 * HEIGHT)
    token_lines(axis, evals, "pretrain/delta_ridge/token")
    axis.plot(evals["step"], evals["pretrain/delta_ridge"], color=MEAN, label="mean")
    axis.set_ylabel("squared distance to ridge")
    log_y(axis)
    step_axis(axis, stages, last_step(evals, stages=stages))
    axis.legend()
    stage_legend(figure, stages)
    return figure
