"""Figures of the calibration grids: how the estimate depends on the settings of its sampler (`sweeps/calibration`).

Each function takes the table of a grid and the traces of its chains, as `icl tabulate` writes them.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.analysis.climb import estimates_so_far
from icl.analysis.run_tables import keys_of
from icl.figures import chains
from icl.figures.elements import legend_below, mark_verdicts, numbers, rows_where
from icl.figures.style import FULL_WIDTH, HEIGHT, log_y, page, panels, seed_looks, shades

GRADIENT, LOCALISATION, NOISE = (f"sampler_config.{name}_scale" for name in ("gradient", "localization", "noise"))
SIZE = "sampler_config.eval_dataset_size"
NAMES = {
    GRADIENT: "gradient scale",
    LOCALISATION: "localisation scale",
    NOISE: "noise scale",
    "sampler_config.eval_batch_size": "batch",
    "sampler_config.grad_batch_size": "batch",
    "sampler_config.eval_method": "loss on",
    "sampler_config.eval_loss_fn": "loss",
}
"""The names of the settings in figures that have a panel or a line for each value."""

BATCHES = {"grad-minibatch": "the gradient's batch", "new-minibatch": "a new batch"}
LOSSES = {"mse": "of all tokens", "subsequence-mse": "of the first k tokens"}

HIGHEST = 10.0
"""The top of the panels of losses, as a multiple of the loss of predicting zero. Chains above it have diverged."""


def scales(estimates: pd.DataFrame, traces: pd.DataFrame) -> Figure:
    """The running mean loss of the chains at the last checkpoint: a row for each gradient scale εnβ/2, a column for each noise scale ε, a
    line for each localisation scale εγ/2."""
    last = rows_where(estimates, step=numbers(estimates, "step").max())
    table = _running(last, traces).rename(columns={"loss/mean": "mean loss of the draws"})
    zero, init = (float(numbers(last, name)[0]) for name in ("loss/zero", "loss/init"))
    return chains.running_estimates(
        table,
        columns="noise scale",
        hue="localisation scale",
        rows="gradient scale",
        value="mean loss of the draws",
        levels={"$L(w_t)$": init, "predicting zero": zero},
        limits=(0.8 * init, HIGHEST * zero),
        log=True,
    )


@page()
def dataset_sizes(estimates: pd.DataFrame) -> Figure:
    """λ̂ against the size n of the data set, one line per checkpoint, with bands of ±2 standard errors."""
    figure, (axis,) = panels(1, 1, FULL_WIDTH * 0.8, 1.3 * HEIGHT)
    steps = sorted({int(step) for step in numbers(estimates, "step")})
    for step, colour in zip(steps, shades("viridis", len(steps)), strict=True):
        mine = rows_where(estimates, step=step).sort_values(SIZE)
        sizes, mean, error = (numbers(mine, name) for name in (SIZE, "llc/mean", "llc/mcse"))
        axis.plot(sizes, mean, color=colour, marker=".", ms=3, lw=1, label=f"step {step:,}")
        axis.fill_between(sizes, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, lw=0)
        mark_verdicts(axis, mine, "llc/mean", at=SIZE)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="size $n$ of the data set", ylabel=r"$\hat\lambda$ (±2 Monte-Carlo s.e.)")
    legend_below(figure, [axis])
    return figure


def batch_sizes(estimates: pd.DataFrame, traces: pd.DataFrame) -> Figure:
    """λ̂(τ) per checkpoint: a column for each batch size, a row for each place where the loss of a draw is taken."""
    table = _running(estimates, traces).replace({"loss on": BATCHES})
    return chains.running_estimates(table, columns="batch", hue="step", rows="loss on")


def fixed_batches(estimates: pd.DataFrame, traces: pd.DataFrame) -> Figure:
    """λ̂(τ) per checkpoint, with the loss of every draw taken on one batch: a panel for each size of that batch."""
    return chains.running_estimates(_running(estimates, traces), columns="batch", hue="step")


def loss_functions(estimates: pd.DataFrame, traces: pd.DataFrame) -> Figure:
    """λ̂(τ) per checkpoint, for chains that the loss of all tokens drives, and for chains that the loss of the first k drives."""
    return chains.running_estimates(_running(estimates, traces).replace({"loss": LOSSES}), columns="loss", hue="step")


@page()
def failures(
    scale_estimates: pd.DataFrame,
    scale_traces: pd.DataFrame,
    early_estimates: pd.DataFrame,
    early_traces: pd.DataFrame,
    still_estimates: pd.DataFrame,
    still_traces: pd.DataFrame,
) -> Figure:
    """Three failures: chains that diverge, chains from weights that are no minimum, and chains that do not explore. Above: the loss of each
    chain. Below: λ̂(τ), as mean over chains. Each model seed has a colour.

    Raises:
        ValueError: no chain of the grid of scales has diverged.
    """
    figure, axes = panels(2, 3, FULL_WIDTH * 1.2, 2.4 * HEIGHT, sharex="col")
    lost = _diverged(scale_estimates)
    settings = (f"{NAMES[name]} {float(numbers(lost, name)[0]):g}" for name in (GRADIENT, NOISE))
    columns = (
        (f"divergence ({', '.join(settings)})", lost, scale_traces),
        ("no minimum (no localisation)", early_estimates, early_traces),
        ("no exploration (almost no noise)", still_estimates, still_traces),
    )
    for index, (title, estimates, traces) in enumerate(columns):
        top, bottom = axes[index], axes[index + 3]
        top.set_title(f"{title}\nstep {int(estimates['step'].iloc[0]):,}", fontsize=7)
        _losses_and_estimates(top, bottom, estimates, traces)
        bottom.set_xlabel(r"draw $\tau$")
    for axis in (axes[0], axes[3]):
        log_y(axis)
    axes[0].set_ylabel("loss of each chain")
    axes[3].set_ylabel(r"$\hat\lambda(\tau)$")
    legend_below(figure, axes)
    return figure


def _running(estimates: pd.DataFrame, traces: pd.DataFrame) -> pd.DataFrame:
    return estimates_so_far(traces, estimates).rename(columns=NAMES)


def _diverged(estimates: pd.DataFrame) -> pd.DataFrame:
    """The setting with the smallest scales at which chains have diverged, with its nβ."""
    lost = estimates.loc[estimates["chains/lost"] > 0].sort_values([LOCALISATION, NOISE, GRADIENT]).head(1)
    if lost.empty:
        raise ValueError("no chain of the grid of scales has diverged")
    return lost.assign(nbeta=2 * lost[GRADIENT] / lost[NOISE])


def _losses_and_estimates(top: Axes, bottom: Axes, estimates: pd.DataFrame, traces: pd.DataFrame) -> None:
    keys = [*keys_of(estimates), "step"]
    of_chains = traces.merge(estimates[keys], on=keys)
    running = estimates_so_far(of_chains, estimates)
    seeds = sorted({int(seed) for seed in numbers(running, "model_seed")})
    for seed, (colour, style) in zip(seeds, seed_looks(len(seeds)), strict=True):
        mine = rows_where(running, model_seed=seed)
        for _, chain in rows_where(of_chains, model_seed=seed).groupby("chain"):
            top.plot(chain["draw"], chain["loss"], color=colour, lw=0.6)
        bottom.plot(mine["draw"], mine["llc/mean"], color=colour, ls=style, label=f"seed {seed}")
        mark_verdicts(bottom, mine.dropna(subset=["llc/mean"]).tail(1), "llc/mean", at="draw")
