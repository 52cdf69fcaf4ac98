"""The figure of the demo: a run's loss, in-context learning, robustness and learning coefficient on one page."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.figures.elements import numbers
from icl.figures.style import MODEL, OPTIMAL, OTHER, ZERO, page, panels, token_colours


def demo_figure(evals: pd.DataFrame, estimates: pd.DataFrame, references: pd.Series) -> Figure:
    """Six panels. All but the last, λ̂ over the loss, are over the training steps.

    Args:
        evals: one row per checkpoint: `step`, and the metrics of `icl.evals.validation_metrics`.
        estimates: one row per checkpoint: `step`, `llc/mean`, `llc/mcse`, `trusted`.
        references: losses of the optimal predictors: `ridge`, `zero`, `ridge/k`.
    """
    with page():
        figure, axes = panels(2, 3, height=4.2)
        _loss(axes[0], evals, references)
        _tokens(axes[1], evals, references)
        _score(axes[2], evals, references)
        _robustness(axes[3], evals)
        _estimates(axes[4], estimates)
        _plane(axes[5], evals, estimates)
        for axis in axes[:5]:
            axis.set_xscale("symlog", linthresh=10)
            axis.set_xlim(0, float(numbers(evals, "step").max()))
            axis.set_xlabel("training step $t$")
        return figure


def _loss(axis: Axes, evals: pd.DataFrame, references: pd.Series) -> None:
    axis.plot(evals["step"], evals["loss/mean"], color=MODEL, label="model")
    axis.axhline(float(references.loc["zero"]), color=ZERO, ls=":", label="predicting zero")
    axis.axhline(float(references.loc["ridge"]), color=OPTIMAL, ls="--", label="ridge (optimal)")
    axis.set(title="loss", ylabel="mean squared error", ylim=(0, None))
    axis.legend()


def _tokens(axis: Axes, evals: pd.DataFrame, references: pd.Series) -> None:
    count = sum(str(name).startswith("ridge/") for name in references.index)
    for k, colour in enumerate(token_colours(count)):
        label = f"$k={k + 1}$" if k in (0, count - 1) else None
        axis.plot(evals["step"], evals[f"loss/{k}"], color=colour, lw=0.9, label=label)
        axis.plot([evals["step"].max()], [references[f"ridge/{k}"]], marker="_", color=colour, clip_on=False)
    axis.set(title="loss per example $k$ (dashes: ridge)", ylabel="mean squared error", ylim=(0, None))
    axis.legend()


def _score(axis: Axes, evals: pd.DataFrame, references: pd.Series) -> None:
    last = max(int(name.split(":")[1]) for name in evals.columns if name.startswith("icl/1:"))
    axis.plot(evals["step"], evals[f"icl/1:{last}"], color=MODEL, label="model")
    axis.axhline(references["ridge/0"] - references[f"ridge/{last - 1}"], color=OPTIMAL, ls="--", label="ridge")
    axis.set(title="in-context learning score", ylabel=rf"$\ell_1-\ell_{last}$, higher is more")
    axis.legend(loc="center left")


def _robustness(axis: Axes, evals: pd.DataFrame) -> None:
    for (gain, style), colour in zip(((3, "-"), (5, "--"), (10, ":")), token_colours(3), strict=True):
        axis.plot(
            evals["step"], evals[f"ood_{gain}_inputs_loss/mean"] / gain**2, color=colour, ls=style, label=f"$g={gain}$"
        )
    axis.set(title="out of distribution: inputs $g\\,x$", ylabel="loss / $g^2$", ylim=(0, None))
    axis.legend()


def _estimates(axis: Axes, estimates: pd.DataFrame) -> None:
    axis.errorbar(
        estimates["step"],
        estimates["llc/mean"],
        yerr=2 * estimates["llc/mcse"],
        color=MODEL,
        capsize=2,
        lw=1,
        label="±2 s.e.",
        clip_on=False,
    )
    for trusted, marker, label in ((True, "o", "healthy"), (False, "x", "see the verdict")):
        chosen = estimates[estimates["trusted"] == trusted]
        if len(chosen):
            colour = MODEL if trusted else OTHER
            axis.plot(chosen["step"], chosen["llc/mean"], marker, ms=4, color=colour, label=label, clip_on=False)
    axis.set(title="local learning coefficient $\\hat\\lambda$", ylabel="$\\hat\\lambda$")
    axis.legend()


def _plane(axis: Axes, evals: pd.DataFrame, estimates: pd.DataFrame) -> None:
    joined = estimates[["step", "llc/mean"]].merge(evals, on="step")
    axis.plot(joined["loss/mean"], joined["llc/mean"], color=OTHER, lw=0.8)
    points = axis.scatter(joined["loss/mean"], joined["llc/mean"], c=joined["step"], cmap="viridis", s=14, zorder=3)
    axis.invert_xaxis()
    axis.set(title="$\\hat\\lambda$ against loss", xlabel="loss (falls to the right)", ylabel="$\\hat\\lambda$")
    axis.figure.colorbar(points, ax=axis, label="$t$")
