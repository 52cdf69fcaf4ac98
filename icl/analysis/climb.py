"""How the loss of chains climbs from the weights w* at which they start, and the estimates from a part of their draws.

λ̂ = nβ(E[L] - L(w*)) assumes that the draws come from one stationary distribution around w*. If the loss of the chains
still climbs, this is wrong. The mean over all draws then depends on their number, and its standard error means little.
The traces of `icl.estimation.traces` show such climbs.
"""

import numpy as np
import pandas as pd

from icl.analysis.run_tables import keys_of


def crossing_draws(traces: pd.DataFrame, estimates: pd.DataFrame, fraction: float = 1.0) -> pd.DataFrame:
    """The draw at which the loss of each chain first reaches this fraction of the way from L(w*) to the loss of predicting zero.

    At a loss above that of predicting zero, nothing of w* is left. Chains may have left its basin long before.

    Args:
        traces: `model_seed`, `step`, `chain`, `draw`, `loss` (mean over the stretch of draws that ends at `draw`).
        estimates: `model_seed`, `step`, `loss/init` (L(w*)), `loss/zero` (the loss of predicting zero). Checkpoints with
            L(w*) not below the loss of predicting zero are left out.
        fraction: the fraction of the way from L(w*) to the loss of predicting zero.

    Returns:
        One row per checkpoint and chain: `model_seed`, `step`, `chain`, and `crossing`, the end of the first stretch of draws whose mean
        loss is above that level or is not a number. It is NaN if there is no such stretch.
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
    """λ̂ = nβ(E[L] - L(w*)) from a part of each chain's draws. By default the first half counts as burn-in.

    Args:
        traces: as in `crossing_draws`, with stretches of equal length.
        estimates: `model_seed`, `step`, `llc/mean`, `loss/excess` (the ratio of these two is nβ), `loss/init`.
        start, end: limits of the part, as fractions of a checkpoint's draws.

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
    return pd.DataFrame(_estimated(joined, nbeta)[[*keys, "loss/mean", "llc/mean", "llc/mcse"]])


def estimates_so_far(traces: pd.DataFrame, estimates: pd.DataFrame) -> pd.DataFrame:
    """λ̂(τ) = nβ(E[L] - L(w*)) from the draws up to τ, for every τ of the traces.

    Args:
        traces: the columns that tell runs apart, `step`, `chain`, `draw`, `loss` (mean over the stretch of draws that ends at `draw`).
        estimates: the same columns, `step`, `loss/init`, and either `nbeta` or `llc/mean` and `loss/excess`, whose ratio is nβ. Further
            columns are kept.

    Returns:
        The rows of `estimates` for every `draw`, with `loss/mean`, `llc/mean` and `llc/mcse` from the draws so far. `llc/mcse` is the
        standard deviation over chains divided by the square root of their number. All three are NaN from the draw at which a chain is no
        longer finite.
    """
    keys = [*keys_of(estimates), "step"]
    ordered = traces.sort_values([*keys, "chain", "draw"], kind="stable").replace({"loss": {np.inf: np.nan}})
    chains = [ordered[key] for key in (*keys, "chain")]
    lengths = ordered["draw"].groupby(chains).diff().fillna(ordered["draw"])
    running = ordered.assign(loss=(lengths * ordered["loss"]).groupby(chains).cumsum() / ordered["draw"])
    over_chains = running.groupby([*keys, "draw"])["loss"].agg(["mean", "sem", "count", "size"]).reset_index()
    over_chains.loc[over_chains["count"] < over_chains["size"], ["mean", "sem"]] = np.nan
    joined = over_chains.merge(estimates, on=keys)
    nbeta = joined["nbeta"] if "nbeta" in joined else joined["llc/mean"] / joined["loss/excess"]
    return _estimated(joined, nbeta).drop(columns=["mean", "sem", "count", "size"])


def _estimated(joined: pd.DataFrame, nbeta: float | pd.Series) -> pd.DataFrame:
    """With λ̂ and its standard error from the `mean` and `sem` of the loss over chains."""
    excess = joined["mean"] - joined["loss/init"]
    found = {"loss/mean": joined["mean"], "llc/mean": nbeta * excess, "llc/mcse": nbeta * joined["sem"]}
    return joined.assign(**found)
