"""Models trained on different numbers of tasks M: the task prior (arXiv 2402.02364) and transient ridge (arXiv 2501.17745).

M is the column `num_tasks`; infinity stands for Gaussian tasks.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from icl.analysis.transient_ridge import critical_steps
from icl.figures.elements import after_start, estimate_line, in_order, legend_below, numbers, rows_where
from icl.figures.style import FULL_WIDTH, HEIGHT, MODEL, OPTIMAL, WIDTH, ZERO, Colour, page, panels, shades


@page()
def task_prior(table: pd.DataFrame) -> Figure:
    """Distance of the predictions to 0 and to those of the mean task, over training, one line per M.

    Args:
        table: one row per `num_tasks`, `step`: `task_prior/zero`, `task_prior/mean_task`.
    """
    figure, axes = panels(1, 2, FULL_WIDTH, 1.4 * HEIGHT, sharey=True)
    colours = task_colours(table)
    titles = {"task_prior/zero": "distance to predicting 0", "task_prior/mean_task": "distance to the mean task"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for tasks, colour in colours.items():
            one = in_order(rows_where(table, num_tasks=tasks))
            one = one[one["step"] > 0]
            axis.plot(one["step"], one[column], color=colour, lw=0.9, label=task_label(tasks))
        axis.set(xscale="log", yscale="log", xlabel="training step $t$", title=title)
    axes[0].set_ylabel(r"$\mathrm{E}\,\Sigma_k\,(\hat y_k - p_k)^2$")
    axes[1].legend(ncols=2, fontsize=6)
    return figure


@page()
def transient_losses(distances: pd.DataFrame) -> Figure:
    """Loss on Gaussian tasks over training, one line per M, with a circle at its smallest value.

    Args:
        distances: one row per `num_tasks`, `step`: `ood/mse`.
    """
    critical = critical_steps(distances)
    figure, (axis,) = panels(1, 1, 1.5 * WIDTH, 1.5 * HEIGHT)
    for tasks, colour in task_colours(distances).items():
        one = in_order(rows_where(distances, num_tasks=tasks))
        one = one[one["step"] > 0]
        axis.plot(one["step"], one["ood/mse"], color=colour, lw=0.9, label=task_label(tasks))
        best = rows_where(critical, num_tasks=tasks)
        axis.plot(best["t_crit"], best["ood/mse"], "o", ms=4, mfc="none", color=colour)
    axis.set(xscale="log", yscale="log", xlabel="training step $t$", ylabel="loss on Gaussian tasks")
    axis.legend(ncols=2, fontsize=6)
    return figure


@page()
def transient_trajectories(scores: pd.DataFrame, references: pd.DataFrame, distances: pd.DataFrame) -> Figure:
    """Joint trajectory PCA: the path of each model, with a circle at its smallest loss on Gaussian tasks and a star at its end.
    Diamonds are dMMSE.

    Args:
        scores: one row per `num_tasks`, `step`: `pc/0`, `pc/1`.
        references: `predictor` ("dmmse" or "ridge"), `num_tasks`, `pc/0`, `pc/1`.
        distances: `num_tasks`, `step`, `ood/mse`.
    """
    critical = critical_steps(distances)
    figure, (axis,) = panels(1, 1, 1.5 * WIDTH, 2 * HEIGHT)
    crit = dict(zip(numbers(critical, "num_tasks"), numbers(critical, "t_crit"), strict=True))
    for tasks, colour in task_colours(scores).items():
        one = in_order(rows_where(scores, num_tasks=tasks))
        axis.plot(one["pc/0"], one["pc/1"], color=colour, lw=0.8, label=task_label(tasks))
        axis.plot(one["pc/0"].iloc[-1], one["pc/1"].iloc[-1], "*", ms=7, color=colour)
        best = rows_where(one, step=crit.get(tasks))
        axis.plot(best["pc/0"], best["pc/1"], "o", ms=4, mfc="none", color=colour)
        ideal = rows_where(references, predictor="dmmse", num_tasks=tasks)
        axis.plot(ideal["pc/0"], ideal["pc/1"], "D", ms=4, color=colour, mec="black", mew=0.4)
    ridge = rows_where(references, predictor="ridge")
    axis.plot(ridge["pc/0"], ridge["pc/1"], "s", ms=6, color=OPTIMAL, mec="black", label="ridge")
    axis.set(xlabel="PC 1", ylabel="PC 2")
    axis.legend(ncols=2, fontsize=6)
    return figure


@page()
def transient_distances(distances: pd.DataFrame) -> Figure:
    """Distance of the predictions to ridge and to dMMSE as a function of M: circles at the smallest loss on Gaussian tasks, stars at
    the end of training.

    Args:
        distances: one row per `num_tasks`, `step`: `ood/mse`, `delta_ridge`, `delta_dmmse`.
    """
    critical = critical_steps(distances)
    figure, (axis,) = panels(1, 1, 1.5 * WIDTH, 1.4 * HEIGHT)
    final = in_order(distances).groupby("num_tasks", as_index=False).last()
    for table, marker, style, when in ((final, "*", "-", "end"), (critical, "o", ":", "smallest OOD loss")):
        finite = table.loc[np.isfinite(numbers(table, "num_tasks"))].sort_values("num_tasks")
        for column, colour, name in (("delta_ridge", MODEL, "ridge"), ("delta_dmmse", ZERO, "dMMSE")):
            axis.plot(
                finite["num_tasks"],
                finite[column],
                marker + style,
                color=colour,
                ms=4,
                lw=0.8,
                label=f"to {name}, {when}",
            )
    axis.set(xscale="log", yscale="log", xlabel="number of tasks $M$", ylabel="squared distance")
    axis.legend(fontsize=6)
    return figure


@page()
def memorisation_map(distances: pd.DataFrame) -> Figure:
    """Over training step and M: is the model nearer to ridge (it generalises) or to dMMSE (it knows its tasks)? And what does that cost on
    Gaussian tasks?

    Left: log10 of the squared distance to ridge over that to dMMSE, on sequences of the model's own tasks; the black line is where both are
    equal. Right: the loss on Gaussian tasks.

    Args:
        distances: one row per `num_tasks`, `step`: `delta_ridge`, `delta_dmmse`, `ood/mse`. Runs without dMMSE (M = ∞) are left out.
    """
    kept = np.isfinite(numbers(distances, "num_tasks")) & (numbers(distances, "step") > 0)
    finite = pd.DataFrame(distances.loc[kept])
    if finite.empty:
        raise ValueError(
            "the table has no model of finitely many tasks after step 0, so there is nothing to compare with dMMSE"
        )
    nearer = np.log10(numbers(finite, "delta_ridge") / numbers(finite, "delta_dmmse"))
    side = finite.assign(side=nearer, ood=np.log10(numbers(finite, "ood/mse")))
    figure, axes = panels(1, 2, FULL_WIDTH, 1.4 * HEIGHT, sharey=True)
    greatest = float(np.abs(nearer).max())
    looks = {
        "side": ("PuOr_r", -greatest, greatest, r"$\log_{10}$ (distance to ridge / to dMMSE)"),
        "ood": ("viridis", None, None, r"$\log_{10}$ loss on Gaussian tasks"),
    }
    for axis, (column, (colours, low, high, title)) in zip(axes, looks.items(), strict=True):
        grid = side.pivot_table(index="num_tasks", columns="step", values=column)
        steps, tasks, values = grid.columns.to_numpy(float), grid.index.to_numpy(float), grid.to_numpy()
        look = {"cmap": colours, "vmin": low, "vmax": high, "rasterized": True}
        across, up = _borders(steps), _borders(tasks)
        mesh = axis.pcolormesh(across, up, values, **look)
        if column == "side" and min(values.shape) > 1:
            axis.contour(steps, tasks, values, levels=[0.0], colors="black", linewidths=0.8)
        axis.set(xscale="log", xlabel="training step $t$", title=title)
        axis.set_yscale("log", base=2)
        axis.set(xlim=(across[0], across[-1]), ylim=(up[0], up[-1]))
        figure.colorbar(mesh, ax=axis)
    axes[0].set_ylabel("number of tasks $M$")
    return figure


@page()
def coefficient_over_tasks(estimates: pd.DataFrame, distances: pd.DataFrame) -> Figure:
    """λ̂ of models trained on M tasks (arXiv 2501.17745, third figure).

    Left: over training, one line per M. Right: over M, at the end of training and, if it is another one, at the estimate nearest in
    log t to t_crit, where the loss on Gaussian tasks is smallest. Bands and bars are ±2 Monte-Carlo standard errors. The dashed line
    is M = ∞ at the end, if it is there.

    Args:
        estimates: one row per number of tasks and `step`, from `icl tabulate` (`by_num_tasks`): `llc/mean`, `llc/mcse`, `verdict`.
        distances: one row per `num_tasks`, `step`: `ood/mse`.
    """
    estimates = by_num_tasks(estimates)
    if estimates.duplicated(["num_tasks", "step"]).any():
        raise ValueError("it shows one run for each number of tasks, and the table has several; choose one of them")
    figure, (left, right) = panels(1, 2, FULL_WIDTH, 1.5 * HEIGHT, sharey=True)
    lasts, criticals = [], []
    critical = critical_steps(distances).set_index("num_tasks")["t_crit"]
    for tasks, colour in task_colours(estimates).items():
        one = in_order(after_start(rows_where(estimates, num_tasks=tasks)))
        estimate_line(left, one, task_label(tasks), colour, band=0.15)
        last = one.iloc[-1]
        if math.isinf(tasks):
            right.axhline(last["llc/mean"], color=colour, ls="--", lw=0.8, label=task_label(tasks))
            continue
        lasts.append(last)
        if tasks in critical.index:
            nearest = int(np.abs(np.log(numbers(one, "step") / max(critical[tasks], 1))).argmin())
            if nearest < len(one) - 1:
                criticals.append(one.iloc[nearest])
    for rows, marker, line, label in ((lasts, "*", "-", "end of training"), (criticals, "o", ":", "smallest OOD loss")):
        table = pd.DataFrame(rows, columns=estimates.columns)
        places, values, errors = (numbers(table, name) for name in ("num_tasks", "llc/mean", "llc/mcse"))
        right.errorbar(places, values, 2 * errors, fmt=marker + line, color=MODEL, ms=4, lw=0.8, label=label)
    left.set(xscale="log", xlabel="training step $t$", ylabel=r"$\hat\lambda$ (±2 Monte-Carlo s.e.)")
    right.set(xlabel="number of tasks $M$")
    right.set_xscale("log", base=2)
    for axis in (left, right):
        axis.axhline(0, color="black", lw=0.5)
    legend_below(figure, (left,))
    right.legend(fontsize=6)
    return figure


def _borders(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """The borders (N + 1,) of cells around increasing places (N,) of a logarithmic axis: geometric means of neighbours."""
    logs = np.log(places)
    steps = np.diff(logs) / 2 if len(logs) > 1 else np.array([0.5])
    inner = logs[:-1] + steps[: len(logs) - 1]
    return np.exp(np.concatenate([[logs[0] - steps[0]], inner, [logs[-1] + steps[-1]]]))


def by_num_tasks(estimates: pd.DataFrame) -> pd.DataFrame:
    """Estimates with the column `num_tasks` of the analyses of families, in place of the setting that `icl tabulate` names."""
    named = estimates.rename(columns={"task_config.num_tasks": "num_tasks"})
    return named.astype({"num_tasks": float}) if "num_tasks" in named.columns else named


def task_colours(table: pd.DataFrame) -> dict[float, Colour]:
    """M -> a viridis colour, darker for fewer tasks.

    Raises:
        ValueError: the table has no column `num_tasks`.
    """
    if "num_tasks" not in table.columns:
        raise ValueError(
            "the table has no column num_tasks, so all its models have the same number of tasks; make a table of several with: "
            "icl analyse --family SWEEP --output data/FAMILY"
        )
    counts = sorted({float(value) for value in numbers(table, "num_tasks")})
    return dict(zip(counts, shades("viridis", len(counts)), strict=True))


def task_label(tasks: float) -> str:
    """M in a legend, as a power of two if it is one."""
    if math.isinf(tasks):
        return r"$M=\infty$"
    exponent = math.log2(tasks)
    return f"$M=2^{{{int(exponent)}}}$" if exponent.is_integer() else f"$M={int(tasks)}$"
