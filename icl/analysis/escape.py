"""Whether chains stayed where they started: when each one left, and what the estimate is once the way out is left out.

λ̂ = nβ(E[L] - L(w*)) takes the chains for draws from one stationary law near w*. A chain that drifts away during the run breaks that twice:
the mean over all draws mixes two regimes, so λ̂ depends on when the chain left, and a standard error from such a trace means little.
Both are visible in the traces of `icl.traces`.
"""

import numpy as np
import pandas as pd


def escape_draws(traces: pd.DataFrame, estimates: pd.DataFrame) -> pd.DataFrame:
    """When each chain first does worse than predicting zero.

    Args:
        traces: `model_seed`, `step`, `chain`, `draw`, `loss` (mean of a stretch of draws that ends there).
        estimates: `model_seed`, `step`, `loss/init` (L(w*)), `loss/zero` (the loss of predicting zero). Checkpoints whose own loss is not
            below the latter are left out: there is nothing to leave.

    Returns:
        One row per checkpoint and chain: `model_seed`, `step`, `chain`, `escape` (the draw that ends the first stretch whose mean loss is
        above that of predicting zero; NaN if there is none).
    """
    keys = ["model_seed", "step"]
    useful = estimates.loc[estimates["loss/init"] < estimates["loss/zero"], [*keys, "loss/zero"]]
    joined = traces.merge(useful, on=keys)
    left = joined.assign(escape=joined["draw"].where(joined["loss"] > joined["loss/zero"]))
    return pd.DataFrame({"escape": left.groupby([*keys, "chain"])["escape"].min()}).reset_index()


def second_half(traces: pd.DataFrame, estimates: pd.DataFrame) -> pd.DataFrame:
    """λ̂ from the second half of each chain's draws alone, the first half taken for burn-in.

    Args:
        traces: as of `escape_draws`, stretches of equal length.
        estimates: `model_seed`, `step`, `llc/mean`, `loss/excess` (whose ratio is nβ), `loss/init`.

    Returns:
        One row per checkpoint: `model_seed`, `step`, `llc/mean`, and `llc/mcse`, the standard deviation over chains divided by the
        square root of their number (NaN for a single chain).
    """
    keys = ["model_seed", "step"]
    last = traces.pivot_table(index=keys, values="draw", aggfunc="max").reset_index()
    late = traces.merge(last, on=keys, suffixes=("", "/last")).query("draw > `draw/last` / 2")
    chains = late.pivot_table(index=[*keys, "chain"], values="loss").groupby(keys)["loss"]
    joined = chains.agg(["mean", "sem"]).reset_index().merge(estimates, on=keys)
    nbeta = float(np.median(joined["llc/mean"] / joined["loss/excess"]))
    return joined[keys].assign(
        **{"llc/mean": nbeta * (joined["mean"] - joined["loss/init"]), "llc/mcse": nbeta * joined["sem"]}
    )
