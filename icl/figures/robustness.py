"""Out-of-distribution behaviour over training: losses for scaled inputs and tasks, and the effective task vector.

Tables are those of `icl.analysis.ood`, one run, with a column `step`.
"""

import pandas as pd
from matplotlib.figure import Figure

from icl.figures.elements import (
    NO_STAGES,
    Stages,
    in_order,
    last_step,
    numbers,
    rows_where,
    stage_legend,
    step_axis,
    step_colours,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, log_y, page, panels, shades


@page()
def gain_sweep(table: pd.DataFrame) -> Figure:
    """The loss divided by 1 + g², and the size of the predictions, over the gain g of inputs and of tasks. One line per checkpoint.

    Args:
        table: one row per `step`, `version` ("inputs" or "tasks") and `gain`: `loss`, `output_ratio`.
    """
    figure, axes = panels(2, 2, FULL_WIDTH, 2.2 * HEIGHT, sharex=True)
    steps = sorted({int(step) for step in numbers(table, "step")})
    colours, shown = step_colours(steps)
    # Not divided by g², because at small g the noise of the labels, which does not shrink with g, would dominate.
    table = table.assign(scaled=table["loss"] / (1 + table["gain"] ** 2))
    labels = {"scaled": "loss / $(1 + g^2)$", "output_ratio": r"$\|\hat y\|$ relative to $g = 1$"}
    for row, (column, label) in enumerate(labels.items()):
        for index, version in enumerate(("inputs", "tasks")):
            axis = axes[2 * row + index]
            for step, colour in colours.items():
                one = rows_where(table, step=step, version=version).sort_values("gain")
                axis.plot(one["gain"], one[column], color=colour, lw=0.6)
            axis.axvline(1, color="black", ls=":", lw=0.6)
            axis.set_xscale("log")
            log_y(axis)
            if row == 0:
                axis.set_title(f"{version} times $g$")
            else:
                axis.set_xlabel("gain $g$")
            if index == 0:
                axis.set_ylabel(label)
    figure.colorbar(shown, ax=axes, label="training step $t$", shrink=0.8)
    return figure


@page()
def effective_task(table: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Cosine to the true task and relative length of the effective task vector. One line per number of examples seen.

    Args:
        table: one row per `step` and `position`: `cosine`, `relative_norm`.
        stages: the end of each stage.
    """
    figure, axes = panels(1, 2, FULL_WIDTH, 1.3 * HEIGHT)
    positions = sorted({int(position) for position in numbers(table, "position")})
    for axis, column, label in zip(
        axes, ("cosine", "relative_norm"), ("cosine to the task", "length / length of the task"), strict=True
    ):
        for position, colour in zip(positions, shades("viridis", len(positions)), strict=True):
            one = in_order(rows_where(table, position=position))
            text = f"{position} examples" if position in (positions[0], positions[-1]) else None
            axis.plot(one["step"], one[column], color=colour, lw=0.9, label=text)
        step_axis(axis, stages, last_step(table, stages=stages))
        axis.set_ylabel(label)
    log_y(axes[1])
    axes[0].legend()
    stage_legend(figure, stages)
    return figure
