"""How the loss of chains climbs away from the weights they started at, and what the estimate is without the first half
of the way.

λ̂ = nβ(E[L] - L(w*)) takes the chains for draws from one stationary law about w*. Chains whose loss still climbs break
that twice: the mean over all draws depends on how many there are, and a standard error of it means little. Both are
visible in the traces of `icl.estimation.traces`.
"""

import numpy as np
import pandas as pd


def crossing_draws(traces: pd.DataFrame, estimates: pd.DataFrame, fraction: float = 1.0) -> pd.DataFrame:
    """When the loss of each chain has first gone this fraction of the way from L(w*) to the loss of predicting zero.

    A loss above that of predicting zero says that nothing of w* is left; chains may have left its basin long before.

    Args:
        traces: `model_seed`, `step`, `chain`, `draw`, `loss` (mean of a stretch of draws that ends there).
        estimates: `model_seed`, `step`, `loss/init` (L(w*)), `loss/zero` (the loss of predicting zero). Checkpoints whose own loss is not
            below the latter are left out: there is no way to go.
        fraction: of the way.

    Returns:
        One row per checkpoint and chain: `model_seed`, `step`, `chain`, `crossing` (the draw that ends the first stretch whose mean loss is
        above, or not a number; NaN if there is none).
    """
    keys = ["model_seed", "step"]
    useful = estimates.loc[estimates["loss/init"] < estimates["loss/zero"], [*keys, "loss/init", "loss/zero"]]
    joined = traces.merge(useful, on=keys)
    rim = joined["loss/init"] + fraction * (joined["loss/zero"] - joined["loss/init"])
    above = joined.assign(crossing=joined["draw"].mask(joined["loss"] <= rim))
    return pd.DataFrame({"crossing": above.groupby([*keys, "chain"])["crossing"].min()}).reset_index()


def estimates_within(
    traces: pd.DataFrame, estimates: pd.DataFrame, start: float = 0.5, end: float = 1.0
) -> pd.DataFrame:
    """λ̂ = nβ(E[L] - L(w*)) from a part of each chain's draws alone; by default the first half is taken for burn-in.

    Args:
        traces: as of `crossing_draws`, stretches of equal length.
        estimates: `model_seed`, `step`, `llc/mean`, `loss/excess` (whose ratio is nβ), `loss/init`.
        start, end: of the part, as shares of a checkpoint's draws.

    Returns:
        One row per checkpoint: `model_seed`, `step`, `loss/mean` of these draws, `llc/mean`, and `llc/mcse`, the standard deviation over
        chains divided by the square root of their number (NaN for a single chain).
    """
    keys = ["model_seed", "step"]
    last = traces.pivot_table(index=keys, values="draw", aggfunc="max").reset_index()
    share = traces.merge(last, on=keys, suffixes=("", "/last")).eval("share = draw / `draw/last`")
    part = share.query("@start < share <= @end")
    chains = part.pivot_table(index=[*keys, "chain"], values="loss").groupby(keys)["loss"]
    joined = chains.agg(["mean", "sem"]).reset_index().merge(estimates, on=keys)
    nbeta = float(np.median(joined["llc/mean"] / joined["loss/excess"]))
    excess = joined["mean"] - joined["loss/init"]
    found = {"loss/mean": joined["mean"], "llc/mean": nbeta * excess, "llc/mcse": nbeta * joined["sem"]}
    return joined[keys].assign(**found)
