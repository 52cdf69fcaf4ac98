"""The stages of a language model's training, read off its behaviour (`icl.analysis.language`)."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

GAIN = -0.1
"""Nats; below it the repetition gain is well outside its noise, which is less than 0.01 for 1,000 random rows."""


def language_stages(behaviour: pd.DataFrame) -> dict[str, float]:
    """Name of a stage -> its end, the step of a checkpoint. The ends increase. Stages that a run has not reached are left
    out, and so are those that are over when the one before them ends.

    - `unigrams`: until the test loss is below the entropy of single tokens;
    - `bigrams`: until predictions are nearest to the bigrams of the data, at the minimum of the bigram score, if that is not the last
      checkpoint;
    - `previous token`: until random tokens that stand twice are predicted better the second time, by 0.1 nats;
    - `induction`: from then on.

    Args:
        behaviour: the table of one run.
    """
    table = behaviour.sort_values("step")
    steps = table["step"].to_numpy(dtype=float)
    last = float(steps[-1])
    below = _first(steps, (table["test/loss"] < table["unigram_entropy"]).to_numpy())
    nearest = float(steps[table["bigram_score"].to_numpy().argmin()])
    if nearest == last:  # the score may still fall
        nearest = np.inf
    induction = _first(steps, (table["repetition_gain"] < GAIN).to_numpy())
    ends = {"unigrams": below, "bigrams": nearest, "previous token": induction, "induction": last + 1}
    reached: dict[str, float] = {}
    for name, end in ends.items():
        if end <= max(reached.values(), default=-1.0):
            continue
        reached[name] = min(end, last + 1)
        if end > last:
            break
    return reached


def _first(steps: NDArray[np.float64], holds: NDArray[np.bool_]) -> float:
    """The first step at which something holds; infinite if there is none."""
    return float(steps[holds.argmax()]) if holds.any() else np.inf
