"""A figure of the search for a sampler's constants: running estimates of every cell at one checkpoint."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from icl.figures.style import FULL_WIDTH, HEIGHT, MEAN, OPTIMAL, page, panels, shades
from icl.sampling.calibration import Calibration, Cell


@page()
def calibration_traces(found: Calibration, step: int) -> Figure:
    """The running estimate of λ̂ over the draws: a row for each nβ, a column for each γ, and a colour for each ε.

    Thin lines are chains, thick lines are their means. The mean is solid for healthy cells and dotted for others. A green panel has a
    cell that is insensitive to ε and γ. The panel of the recommended cell has a red frame. The title says whether there is a region of
    insensitivity.
    """
    cells = [cell for cell in found.traces if cell.step == step and not cell.setting]
    gammas, nbetas = (sorted({getattr(cell, name) for cell in cells}) for name in ("gamma", "nbeta"))
    epsilons = sorted({cell.epsilon for cell in cells})
    colours = dict(zip(epsilons, shades("viridis", len(epsilons)), strict=True))
    figure, axes = panels(
        len(nbetas), len(gammas), FULL_WIDTH, 0.8 * HEIGHT * len(nbetas) + 0.6, sharex=True, sharey="row"
    )
    rows = found.table.to_dict("records")
    region = {(row["gamma"], row["nbeta"]) for row in rows if row["step"] == step and row["insensitive"]}
    places = [(nbeta, gamma) for nbeta in nbetas for gamma in gammas]
    for axis, (nbeta, gamma) in zip(axes, places, strict=True):
        here = [cell for cell in cells if cell.nbeta == nbeta and cell.gamma == gamma]
        for cell in here:
            running = np.asarray(cell.running, dtype=float)
            axis.plot(cell.draws, running.T, color=colours[cell.epsilon], lw=0.3, alpha=0.6)
            style = "-" if cell.healthy else ":"
            axis.plot(cell.draws, running.mean(axis=0), color=colours[cell.epsilon], lw=1.3, ls=style)
        axis.set_title(rf"$\gamma$ = {gamma:g}, $n\beta$ = {nbeta:g}", fontsize=7)
        if (gamma, nbeta) in region:
            axis.set_facecolor((*_rgb(OPTIMAL), 0.12))
        if found.recommended is not None and found.recommended[1:] == (gamma, nbeta):
            axis.spines[:].set(visible=True, color=MEAN, linewidth=1.5)
    for row in range(len(nbetas)):
        of_row = [cell for cell in cells if cell.nbeta == nbetas[row]]
        axes[row * len(gammas)].set(ylim=_limits(of_row), ylabel=r"$\hat\lambda(\tau)$")
    for axis in axes[-len(gammas) :]:
        axis.set_xlabel(r"draw $\tau$")
    handles = [Line2D([], [], color=colour, label=rf"$\epsilon$ = {epsilon:g}") for epsilon, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(
        f"step {step}: " + ("region of insensitivity in green" if found.region else "no region of insensitivity")
    )
    return figure


def _limits(cells: Sequence[Cell]) -> tuple[float, float] | None:
    """The range of the healthy cells' estimates, so that diverging cells do not flatten the others."""
    values = [np.asarray(cell.running, dtype=float)[:, -1].mean() for cell in cells if cell.healthy]
    if not values:
        return None
    low, high = min(0.0, *values), max(0.0, *values)
    return low - 0.1 * (high - low), high + 0.4 * (high - low)


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]
