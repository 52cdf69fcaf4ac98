"""What a run's evaluations and estimates say together: fits of its curves, and the loss of the optimum."""

import pandas as pd

from icl.analysis.gaussian_process import smooth_curve

FIRST_STEP = 10
"""Where fits begin: from here on log t resolves the grid of steps."""

_FEWEST_TO_FIT = 3


def fitted_curves(evals: pd.DataFrame, llc: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Gaussian-process fits of one run: "loss", "llc" and "norm" (of the weights) -> `gaussian_process.smooth_curve`.

    A curve with fewer than three points is left out.
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
    """The loss of ridge on the sequences of the estimates, for Gaussian tasks: the median over the runs' last estimates.

    It is L(w) less the model's mean squared distance to ridge. Ridge is the posterior mean, so that
    E(ŷ - y)² = E(r - y)² + E(ŷ - r)².
    """
    keys = ["model_seed", "step"]
    both = llc.merge(evals[[*keys, "pretrain/delta_ridge"]], on=keys).sort_values("step")
    last = both.groupby("model_seed").tail(1)
    return float((last["loss/init"] - last["pretrain/delta_ridge"]).median())
