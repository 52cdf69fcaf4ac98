"""Structural collapse: spectra of the embeddings, layer norms, unembedding (arXiv 2402.02364, appendix on structure).

Tables are those of `icl.analysis.structure`, one run, with a column `step`.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.analysis.structure import OFF, layer_norm_statistics
from icl.figures.curvature import draw_hessian
from icl.figures.elements import (
    NO_STAGES,
    Stages,
    in_order,
    last_step,
    mean_and_spread,
    stage_legend,
    step_axis,
    token_lines,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, MEAN, MODEL, log_y, page, panels, shades

_LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))  # for grey printing
_SYMBOLS = {"weight": r"\gamma", "bias": r"\beta"}


@page()
def embed_collapse(spectra: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Shares σ_i²/Σσ² of both embeddings' spectra, effective ranks, and how much of the token embedding lies in the space of the
    position embedding.

    Args:
        spectra: `embed/S_normed/i`, `postn/S_normed/i`, `embed/effective_rank`, `postn/effective_rank`, `alignment/i`.
        stages: the end of each stage.
    """
    spectra = in_order(spectra)
    figure, axes = panels(1, 4, FULL_WIDTH * 1.3, 1.5 * HEIGHT)
    for axis, name, title in zip(axes, ("embed", "postn"), ("token embedding", "positional embedding"), strict=False):
        token_lines(axis, spectra, f"{name}/S_normed", label="$i={}$")
        axis.set(title=title, ylabel=r"$\sigma_i^2 / \sum \sigma^2$")
        log_y(axis)
    axes[2].plot(spectra["step"], spectra["embed/effective_rank"], color=MEAN, label="token")
    axes[2].plot(spectra["step"], spectra["postn/effective_rank"], color=MODEL, ls="--", label="positional")
    axes[2].set(title="effective rank", ylabel=r"$\exp H(\sigma_i^2 / \sum \sigma^2)$")
    token_lines(axes[3], spectra, "alignment", label="column {}")
    axes[3].set(title="token in positional space", ylabel=r"$\|U_r U_r^\top e_i\| / \|e_i\|$", ylim=(0, 1))
    for axis in axes:
        step_axis(axis, stages, last_step(spectra, stages=stages), names=axis is axes[0])
        axis.legend()
    stage_legend(figure, stages)
    return figure


@page()
def unembed_collapse(coordinates: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """The final norm, the unembedding row of the prediction, and the product of the two. Weights are above, biases below.

    Args:
        coordinates: `layer_norm_coordinates`: `layer`, `parameter`, `index`, `value`.
        stages: the end of each stage.
    """
    figure, axes = panels(2, 3, FULL_WIDTH, 2.3 * HEIGHT, sharex=True)
    layers = {"final_norm": "layer norm", "unembedding": "linear map", "effective": "together"}
    for row, parameter in enumerate(("weight", "bias")):
        for column, (layer, title) in enumerate(layers.items()):
            axis = axes[3 * row + column]
            _coordinates(axis, coordinates, layer, parameter)
            axis.set_title(f"{title}, {parameter}")
            axis.axhline(0, color="black", lw=0.5)
            step_axis(axis, stages, last_step(coordinates, stages=stages), names=row == 0)
            if row == 0:
                axis.set_xlabel("")
    axes[0].legend()
    stage_legend(figure, stages)
    return figure


@page()
def norm_collapse(coordinates: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Mean ± one standard deviation of gain and shift over coordinates, one line per layer norm.

    Args:
        coordinates: `layer`, `parameter`, `step`, `index`, `value`.
        stages: the end of each stage.
    """
    statistics = in_order(layer_norm_statistics(coordinates))
    layers = norm_layers(statistics)
    figure, axes = panels(2, 1, FULL_WIDTH * 0.8, 2 * HEIGHT, sharex=True)
    for axis, parameter in zip(axes, ("weight", "bias"), strict=True):
        for i, (layer, colour) in enumerate(zip(layers, shades("viridis", len(layers)), strict=True)):
            one = statistics[(statistics["layer"] == layer) & (statistics["parameter"] == parameter)]
            style = _LINE_STYLES[i % len(_LINE_STYLES)]
            axis.plot(one["step"], one["mean"], color=colour, ls=style, label=pretty_layer(layer))
            low, high = one["mean"] - one["std"], one["mean"] + one["std"]
            axis.fill_between(one["step"], low, high, color=colour, alpha=0.1, lw=0)
        axis.set_ylabel(rf"${_SYMBOLS[parameter]}$, mean ± s.d. over coordinates")
        step_axis(axis, stages, last_step(statistics, stages=stages), names=axis is axes[0])
    axes[0].set_xlabel("")
    axes[0].legend(ncols=2)
    stage_legend(figure, stages)
    return figure


@page()
def norm_collapse_detail(coordinates: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """Every coordinate of every layer norm, gains above and shifts below. The insets show the share of coordinates below 0.1 in
    magnitude."""
    layers = norm_layers(coordinates)
    figure, axes = panels(2, len(layers), FULL_WIDTH * 1.6, 2.4 * HEIGHT, sharex=True)
    for row, parameter in enumerate(("weight", "bias")):
        for column, layer in enumerate(layers):
            axis = axes[len(layers) * row + column]
            wide = _coordinates(axis, coordinates, layer, parameter)
            axis.set(title=pretty_layer(layer) if row == 0 else "", ylabel=f"${_SYMBOLS[parameter]}$")
            step_axis(axis, stages, last_step(coordinates, stages=stages), names=False)
            low, high = axis.get_ylim()
            axis.set_ylim(low - 0.45 * (high - low), high)  # room for the inset
            inset = axis.inset_axes((0.12, 0.04, 0.55, 0.18))
            inset.plot(wide.index, (wide.abs() < OFF).mean(axis=1), color=MEAN, lw=0.8)
            inset.set(xscale="log", ylim=(0, 1.05), xlim=axis.get_xlim(), yticks=[0, 1])
            inset.set_title(f"share below {OFF} in magnitude", fontsize=5, pad=1)
            inset.tick_params(labelsize=5, labelbottom=False, length=2, which="both")
            if row == 0:
                axis.set_xlabel("")
    stage_legend(figure, stages)
    return figure


@page()
def norm_collapse_and_hessian(coordinates: pd.DataFrame, hessian: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """The final norm's gains above the Hessian of the loss."""
    figure, (above, below) = panels(2, 1, FULL_WIDTH * 0.8, 2 * HEIGHT, sharex=True)
    _coordinates(above, coordinates, "final_norm", "weight")
    above.set_ylabel(r"$\gamma$ of the final norm")
    draw_hessian(below, hessian)
    for axis in (above, below):
        step_axis(axis, stages, last_step(coordinates, hessian, stages=stages), names=axis is above)
    above.set_xlabel("")
    above.legend()
    stage_legend(figure, stages)
    return figure


def norm_layers(table: pd.DataFrame) -> list[str]:
    """The layer norms in order of depth."""
    blocks = sorted({layer for layer in table["layer"] if layer.startswith("blocks.")}, key=_depth)
    return [*blocks, *(["final_norm"] if "final_norm" in set(table["layer"]) else [])]


def pretty_layer(layer: str) -> str:
    """A layer norm's name in a legend, blocks counted from 1."""
    if not layer.startswith("blocks."):
        return "before unembedding"
    _, block, part = layer.split(".")
    return f"block {int(block) + 1}, before {'attention' if part.startswith('attention') else 'MLP'}"


def _depth(layer: str) -> tuple[int, bool]:
    _, block, part = layer.split(".")
    return int(block), part.startswith("mlp")


def _coordinates(axis: Axes, coordinates: pd.DataFrame, layer: str, parameter: str) -> pd.DataFrame:
    """Draw thin lines for one vector's coordinates, and their mean ± standard deviation; returns the table steps × coordinates."""
    chosen = coordinates[(coordinates["layer"] == layer) & (coordinates["parameter"] == parameter)]
    wide = chosen.pivot(index="step", columns="index", values="value").sort_index()
    if wide.shape[1] == 1:
        axis.plot(wide.index, wide.iloc[:, 0], color=MEAN)
        return wide
    for column, colour in zip(wide.columns, shades("viridis", wide.shape[1]), strict=True):
        axis.plot(wide.index, wide[column], color=colour, lw=0.3, alpha=0.7)
    steps: Sequence[float] = list(wide.index)
    mean_and_spread(axis, steps, wide.mean(axis=1), wide.std(axis=1, ddof=0), "mean ± s.d.")
    return wide
