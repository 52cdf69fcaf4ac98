"""Smooth fits of a run's curves, and the loss of the optimal predictor."""

import pandas as pd

from icl.analysis.gaussian_process import smooth_curve

FIRST_STEP = 10
"""The first step of fits. Earlier steps are too far apart in log t."""

_FEWEST_TO_FIT = 3


def fitted_curves(evals: pd.DataFrame, llc: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Gaussian-process fits of one run: "loss", "llc" and "norm" (of the weights) -> table of `gaussian_process.smooth_curve`.

    Curves with fewer than three points are left out.
    """
    curves = {
        "loss": (evals, "loss/mean", None),
        "llc": (llc, "llc/mean", "llc/mcse"),
        "norm": (evals, "weight/norm", None),
    }
    fits = {}
    for name, (table, column, error) in curves.items():
        if column in table.columns:
            chosen = table.loc[table["step"] >= FIRST_STEP].dropna(subset=[column])
            if len(chosen) >= _FEWEST_TO_FIT:
                fits[name] = smooth_curve(chosen["step"], chosen[column], chosen.get(error, 0.0))
    return fits


def ridge_loss(llc: pd.DataFrame, evals: pd.DataFrame) -> float:
    """The loss of ridge regression on the sequences of the estimates, for Gaussian tasks: the median over the runs' last estimates.

    It is L(w) minus the model's mean squared distance to ridge. This holds because ridge is the posterior mean r, and so
    E(ŷ - y)² = E(r - y)² + E(ŷ - r)².
    """
    keys = ["model_seed", "step"]
    both = llc.merge(evals[[*keys, "pretrain/delta_ridge"]], on=keys).sort_values("step")
    last = both.groupby("model_seed").tail(1)
    return float((last["loss/init"] - last["pretrain/delta_ridge"]).median())
