"""Figures of language models: the published curve, the behaviour of a run, and the heads of an induction circuit at work."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from icl.figures.elements import (
    NO_STAGES,
    StageEnds,
    Stages,
    first_step,
    in_order,
    last_step,
    numbers,
    stage_legend,
    step_axis,
)
from icl.figures.style import FULL_WIDTH, HEIGHT, MEAN, MODEL, OPTIMAL, OTHER, WIDTH, ZERO, page, panels, shades

PUBLISHED_STAGES = StageEnds({"LM1": 900, "LM2": 6500, "LM3": 8500, "LM4": 17000, "LM5": 50000}, first=100, exact=True)
"""The stages of the two-layer language model of arXiv 2402.02364."""


@page()
def published_curve(table: pd.DataFrame) -> Figure:
    """The published two-layer language model: its loss, its λ̂ as published and without the artefact, and the spread of λ̂ over the loss.

    Args:
        table: `step`, `test_loss`, `llc_mean_raw`, `llc_std_raw`, `llc_corrected`, `std_over_loss`, and `artefact_spread`, the value of
            `std_over_loss` that the artefact alone would give (`benchmarks.language`).
    """
    table = in_order(pd.DataFrame(table[table["step"] > 0]))
    figure, (top, middle, bottom) = panels(3, 1, 1.5 * WIDTH, 2.7 * HEIGHT, sharex=True)
    for axis in (top, middle, bottom):
        step_axis(axis, PUBLISHED_STAGES, 50_000, names=axis is top)
    for axis in (top, middle):
        axis.set_xlabel("")
    steps = numbers(table, "step")
    top.plot(steps, numbers(table, "test_loss"), color=MODEL)
    top.set_ylabel("test loss (nats)")
    middle.plot(steps, numbers(table, "llc_mean_raw"), color=ZERO, label="as published")
    middle.plot(steps, numbers(table, "llc_corrected"), color=MODEL, label=r"less its artefact, $10.26\,\ell$")
    middle.set_ylabel(r"$\hat\lambda$")
    middle.legend(loc="lower right")
    bottom.plot(steps, numbers(table, "std_over_loss"), color=ZERO, lw=0.7, label="published")
    bottom.axhline(numbers(table, "artefact_spread")[0], color=OTHER, ls="--", label="by the artefact alone")
    bottom.set(ylabel=r"spread of $\hat\lambda$ / loss", ylim=(0, 8))
    bottom.legend(loc="lower right")
    stage_legend(figure, PUBLISHED_STAGES)
    return figure


@page()
def behaviour(table: pd.DataFrame, stages: Stages = NO_STAGES) -> Figure:
    """A language model's behaviour over training: losses with the entropies of unigrams and bigrams, what it gains from context, the heads.

    Args:
        table: one run, the table `behaviour` of `icl.analysis.language`.
        stages: the end of each stage.
    """
    table = in_order(pd.DataFrame(table[table["step"] > 0]))
    steps = numbers(table, "step")
    figure, (top, middle, bottom) = panels(3, 1, FULL_WIDTH, 2.7 * HEIGHT, sharex=True)
    for axis in (top, middle, bottom):
        first = first_step(stages) if stages else float(steps.min())
        step_axis(axis, stages, last_step(table, stages=stages), first, names=axis is top)
    for axis in (top, middle):
        axis.set_xlabel("")
    for column, colour, label in (
        ("test/loss", MODEL, "test loss"),
        ("test/loss_without_positions", ZERO, "without positions"),
        ("bigram_score", OPTIMAL, "bigram score"),
    ):
        top.plot(steps, numbers(table, column), color=colour, label=label)
    for column, label in (("unigram_entropy", "unigrams"), ("bigram_entropy", "bigrams")):
        top.axhline(
            numbers(table, column)[-1],
            color=OTHER,
            ls="--" if label == "unigrams" else ":",
            label=f"entropy of {label}",
        )
    top.set_ylabel("nats")
    top.legend(loc="upper right", bbox_to_anchor=(1, 0.96), ncols=3)  # below the names of the stages
    middle.plot(steps, numbers(table, "test/icl_wide"), color=MEAN, label="in-context score")
    middle.plot(steps, numbers(table, "repetition_gain"), color=ZERO, label="repetition gain")
    middle.axhline(0, color=OTHER, lw=0.6)
    middle.set_ylabel("nats (negative: uses context)")
    middle.legend(loc="lower left")
    bottom.plot(steps, numbers(table, "previous_token/max"), color=MODEL, label="previous token")
    bottom.plot(steps, numbers(table, "prefix_matching/max"), color=ZERO, label="prefix matching")
    bottom.set(ylabel="attention, largest head", ylim=(0, None))
    bottom.legend(loc="upper left")
    stage_legend(figure, stages)
    return figure


@page()
def attention_of_heads(patterns: Mapping[str, Tensor]) -> Figure:
    """What some heads attend to in one row, side by side: queries from top to bottom, keys from left to right, darker for more attention.

    Args:
        patterns: name of a head -> its attention (T, T), queries × keys.
    """
    figure, axes = panels(1, len(patterns), FULL_WIDTH, 1.1 * FULL_WIDTH / len(patterns))
    for axis, (name, pattern) in zip(axes, patterns.items(), strict=True):
        axis.imshow(pattern.detach().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=name, xlabel="attended token (key)")
    axes[0].set_ylabel("token that attends (query)")
    return figure


@page()
def losses_on_repeats(losses: Mapping[int, Tensor], stages: Stages = NO_STAGES) -> Figure:
    """Loss on random tokens that stand twice, by their place in the row, at several checkpoints. The second copy begins at the dashed line.

    Args:
        losses: step -> mean loss (2N,) on the tokens after BOS of `icl.analysis.induction.repeated_rows`.
        stages: the end of each stage; a checkpoint is labelled with the stage in which it lies.
    """
    figure, (axis,) = panels(1, 1, 1.5 * WIDTH, 1.3 * HEIGHT)
    for (step, values), colour in zip(losses.items(), shades("viridis", len(losses)), strict=True):
        stage = next((f", {name}" for name, end in stages.items() if step < end), "")
        axis.plot(np.arange(1, len(values) + 1), values.numpy(), color=colour, label=f"step {step:,}{stage}")
    half = len(next(iter(losses.values()))) / 2
    axis.axvline(half + 0.5, color=OTHER, ls="--", lw=0.8)
    axis.set(xlabel="place in the row", ylabel="loss (nats)", xlim=(1, 2 * half))
    figure.legend(loc="outside lower center", ncols=2)
    return figure
