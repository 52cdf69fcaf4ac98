"""What changes over the paper's stages in a run: the loss, and λ̂ by each way to estimate it."""

import numpy as np
import pandas as pd

from benchmarks.reproduction.comparison import Change
from benchmarks.reproduction.shipped import Shipped
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.sampling.verdict import RHAT_LIMIT

Changes = dict[str, Change]
"""By stage."""


def loss_changes(run: Shipped) -> list[float]:
    """Of the evaluator's loss, stage by stage."""
    losses = run.needed("evals").set_index("step")["pretrain/mse"]
    return np.diff(losses.loc[list(run.boundaries().values())]).tolist()


def low_noise_loss_changes(run: Shipped) -> list[float]:
    """The same on the reference code's validation sequences."""
    return np.diff([float(run.low_noise_errors(step).mean()) for step in run.boundaries().values()]).tolist()


def llc_changes(run: Shipped, name: str = "llc") -> Changes:
    """Of a table's estimates between the checkpoints nearest to the published stage ends."""
    return _between(run, run.needed(name), name)


def late_llc_changes(run: Shipped) -> Changes:
    """The same under the published settings, from the second half of the draws alone."""
    return _between(run, run.second_half, "llc")


def burnt_in_llc_changes(run: Shipped, name: str = "llc") -> Changes:
    """The same as `llc_changes` without the burn-in that the paper's table of settings names."""
    return _between(run, run.after_burnin(name), name)


def _between(run: Shipped, estimates: pd.DataFrame, name: str) -> Changes:
    """Chains disagree where those of all draws do, in the table called `name`. A stage without both estimates is left out."""
    rows, rhat = estimates.set_index("step"), run.needed(name).set_index("step")["llc/rhat"]
    changes = {}
    for stage, ends in zip(PUBLISHED_STAGE_ENDS, run.spans(), strict=True):
        if not set(ends) <= set(rows.index):
            continue
        both = rows.loc[list(ends)]
        change = float(both["llc/mean"].iloc[1] - both["llc/mean"].iloc[0])
        disagree = bool((rhat[list(ends)] > RHAT_LIMIT).any())
        changes[stage] = Change(change, float(np.hypot(*both["llc/mcse"])), disagree)
    return changes


def smooth_llc_changes(run: Shipped) -> Changes:
    """Of a smooth fit to all estimates under the published settings (`icl.analysis.stages.stage_table`)."""
    raw = llc_changes(run)
    return {row.stage: Change(row.delta_llc, row.delta_llc_std, raw[row.stage].disagree) for row in _fits(run, "llc")}


def types(run: Shipped, name: str) -> dict[str, tuple[str, float]]:
    """Stage -> its type in a table of estimates, and the share of the smooth fit's posterior draws that have it."""
    return {row.stage: (row.type, row.type_probability) for row in _fits(run, name)}


def _fits(run: Shipped, name: str):
    table = run.needed("stages")
    return table[table["setting"] == name].itertuples(index=False)
