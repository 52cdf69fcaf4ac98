"""Essential dynamics: the trajectory of the model's outputs in its principal components, its evolute, and its forms (arXiv 2402.02364).

A trajectory has `step`, `pc/0`, `pc/1`, ... Its circles and forms are those of `icl.analysis.forms`.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.analysis.forms import circles_of, forms_of, functional_trajectory
from icl.figures.elements import (
    NO_STAGES,
    Stages,
    in_order,
    last_step,
    numbers,
    rows_where,
    stage_colours,
    step_axis,
    token_count,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, MEAN, MODEL, OPTIMAL, OTHER, page, panels, shades

_SHOWN_CIRCLES = 120
_SHOWN_SHARE = 0.6  # of the trajectory, in the figure of its geometry: published are 3000 of 5000 checkpoints


def planes_of_outputs(essential_dynamics: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """`planes` of the trajectory that the paper shows."""
    return planes(functional_trajectory(essential_dynamics), stages)


@page()
def planes(trajectories: pd.DataFrame, stages: Stages = NO_STAGES, num_components: int = 3) -> Figure:
    """The trajectory in every plane of the first components, coloured by stage, and the explained variance. One row per variant.

    Args:
        trajectories: one run: `step`, `pc/i`, `explained_variance_ratio/i`, and `variant` if there are several (outputs, weights,
            gradients).
        stages: the end of each stage.
        num_components: how many components.
    """
    if "variant" not in trajectories.columns:
        trajectories = trajectories.assign(variant="")
    variants = list(dict.fromkeys(trajectories["variant"]))
    pairs = list(combinations(range(min(num_components, token_count(trajectories, "pc"))), 2))
    columns = len(pairs) + 1
    figure, axes = panels(len(variants), columns, FULL_WIDTH * 1.3, 1.4 * HEIGHT * len(variants))
    for row, variant in enumerate(variants):
        trajectory = in_order(rows_where(trajectories, variant=variant))
        own = axes[row * columns : (row + 1) * columns]
        for axis, (y, x) in zip(own, pairs, strict=False):
            axis.scatter(
                numbers(trajectory, f"pc/{x}"), numbers(trajectory, f"pc/{y}"), s=3, color=OTHER, alpha=0.5, lw=0
            )
            _by_stage(axis, trajectory, x, y, stages)
            axis.set(xlabel=f"PC {x + 1}", ylabel=f"PC {y + 1}", title=variant if y == 0 and x == 1 else "")
            axis.tick_params(labelsize=6)
        shares = trajectory[
            [f"explained_variance_ratio/{i}" for i in range(token_count(trajectory, "explained_variance_ratio"))]
        ].iloc[0]
        bars = own[-1].bar(range(1, len(shares) + 1), shares.to_numpy(dtype=float), color=MODEL)
        own[-1].bar_label(bars, fmt="%.2f", fontsize=6)
        own[-1].set(xlabel="component", ylabel="explained variance", ylim=(0, 1.15))
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend()
    return figure


@page()
def evolutes(essential_dynamics: pd.DataFrame, stages: Stages = NO_STAGES, num_components: int = 3) -> Figure:
    """The smoothed trajectory with its osculating circles, their centres (the evolute), its sharpest points and its forms.

    The raw trajectory is drawn as grey points. For each form, one cross marks where the trajectory turns, and another the point around
    which it turns in this plane. Planes may disagree about that point (`spread` of `icl.analysis.geometry.detect_forms`). The figure
    shows the same part of the trajectory as the published one. After it, the evolute is only that of noise around a resting point.

    Args:
        essential_dynamics: one run: `variant`, `step`, `pc/i`.
        stages: the end of each stage.
        num_components: how many components.
    """
    raw = in_order(functional_trajectory(essential_dynamics))
    forms, circles = forms_of(raw, num_components), circles_of(raw, num_components)
    end = float(raw["step"].iloc[round(_SHOWN_SHARE * (len(raw) - 1))])
    trajectory, circles = _until(raw, end), _until(circles, end)
    forms = None if forms is None else _until(forms, end)
    planes_there = list(dict.fromkeys(zip(circles["pc_x"].tolist(), circles["pc_y"].tolist(), strict=True)))
    figure, axes = panels(1, len(planes_there), FULL_WIDTH * len(planes_there) / 2.5, 2 * HEIGHT)
    for axis, (x, y) in zip(axes, planes_there, strict=True):
        plane = in_order(rows_where(circles, pc_x=x, pc_y=y))
        raw_x, raw_y = numbers(trajectory, f"pc/{x}"), numbers(trajectory, f"pc/{y}")
        axis.scatter(raw_x, raw_y, s=2, color=OTHER, alpha=0.3, lw=0)
        _limits(axis, raw_x, raw_y)
        _draw_circles(axis, plane)
        smooth = plane.rename(columns={"x": f"pc/{x}", "y": f"pc/{y}"})
        _by_stage(axis, smooth, x, y, stages)
        sharp = plane.nsmallest(5, "radius")
        axis.scatter(sharp["x"], sharp["y"], marker="^", s=12, color=MEAN, zorder=5, label="sharpest")
        if forms is not None and len(forms):
            turning = plane.iloc[
                np.searchsorted(numbers(plane, "step"), numbers(forms, "step")).clip(max=len(plane) - 1)
            ]
            axis.scatter(
                turning["x"], turning["y"], marker="x", s=22, color=OPTIMAL, zorder=6, label="turning round a form"
            )
            axis.scatter(
                turning["centre_x"],
                turning["centre_y"],
                marker="+",
                s=30,
                color=OPTIMAL,
                zorder=6,
                label="its centre here",
            )
        axis.set(xlabel=f"PC {x + 1}", ylabel=f"PC {y + 1}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


@page()
def components_over_time(
    essential_dynamics: pd.DataFrame, stages: Stages = NO_STAGES, num_components: int = 3
) -> Figure:
    """The first components over the training steps, with dotted lines at the detected forms."""
    trajectory = in_order(functional_trajectory(essential_dynamics))
    forms = forms_of(trajectory)
    count = min(num_components, token_count(trajectory, "pc"))
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.9, 1.3 * HEIGHT)
    for i, colour in enumerate(shades("magma", count + 1)[:count]):
        axis.plot(trajectory["step"], trajectory[f"pc/{i}"], color=colour, label=f"PC {i + 1}")
    for step in [] if forms is None else forms["step"]:
        axis.axvline(step, color="black", ls=":", lw=0.8)
    step_axis(axis, stages, last_step(trajectory, stages=stages))
    axis.set_ylabel("score")
    axis.legend()
    return figure


def _until(table: pd.DataFrame, end: float) -> pd.DataFrame:
    return table.loc[numbers(table, "step") <= end]


def _by_stage(axis: Axes, table: pd.DataFrame, x: int, y: int, stages: Stages) -> None:
    """The trajectory as a line, one colour per stage."""
    steps, xs, ys = numbers(table, "step"), numbers(table, f"pc/{x}"), numbers(table, f"pc/{y}")
    if not stages:
        axis.plot(xs, ys, color=MODEL, lw=1)
        return
    start = 0.0
    for (name, end), colour in zip(stages.items(), stage_colours(stages).values(), strict=True):
        # One point of the next stage is included, so that the line has no gap.
        first, last = np.searchsorted(steps, start), np.searchsorted(steps, end) + 1
        if last - first > 1:
            axis.plot(xs[first:last], ys[first:last], color=colour, lw=1.3, label=name)
        start = end


def _draw_circles(axis: Axes, plane: pd.DataFrame) -> None:
    every = max(1, len(plane) // _SHOWN_CIRCLES)
    left, right = axis.get_xlim()
    low, high = axis.get_ylim()
    angle = np.linspace(0, 2 * np.pi, 90)
    for _, circle in plane.iloc[::every].iterrows():
        radius = float(circle["radius"])
        if np.isfinite(radius) and radius < 4 * max(right - left, high - low):
            axis.plot(
                circle["centre_x"] + radius * np.cos(angle), circle["centre_y"] + radius * np.sin(angle),
                color="lightgrey", lw=0.3, alpha=0.5, zorder=0,
            )  # fmt: skip
    centre_x, centre_y = numbers(plane, "centre_x"), numbers(plane, "centre_y")
    inside = (centre_x > left) & (centre_x < right) & (centre_y > low) & (centre_y < high)
    axis.scatter(centre_x[inside], centre_y[inside], s=1.5, color="black", lw=0, zorder=2, label="evolute")


def _limits(axis: Axes, xs: np.ndarray, ys: np.ndarray) -> None:
    for values, limit in ((xs, axis.set_xlim), (ys, axis.set_ylim)):
        margin = 0.15 * float(np.ptp(values))
        limit(values.min() - margin, values.max() + margin)
