"""Estimates of learning coefficients that are known, by sampler."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from icl.figures.elements import numbers, rows_where
from icl.figures.style import FULL_WIDTH, HEIGHT, MODEL, OPTIMAL, OTHER, ZERO, page, panels

_LOOK = {"icl": (MODEL, "o"), "devinterp sgld": (ZERO, "^"), "devinterp rmsprop_sgld": (OPTIMAL, "s")}
SINGULAR = ("reduced-rank regression", "deep linear network")
TARGETS = ((0.05, 0.5), (0.15, 0.9))
"""|relative error| and the share of singular models that should lie below it."""


@page()
def accuracy(estimates: pd.DataFrame) -> Figure:
    """Left: λ̂/λ against λ for every model and sampler. Right: the share of reduced-rank and deep linear networks whose |relative error| is
    below a value; crosses mark a median of 5 % and a 90th percentile of 15 %.

    Args:
        estimates: one row per model and sampler: `method`, `family`, `coefficient`, `relative_error` (NaN where all chains were lost).
    """
    figure, (left, right) = panels(1, 2, FULL_WIDTH, 1.7 * HEIGHT)
    for method, (colour, marker) in _LOOK.items():
        rows = rows_where(estimates, method=method)
        if not len(rows):
            continue
        ratio = 1.0 + numbers(rows, "relative_error")
        left.scatter(
            numbers(rows, "coefficient"), ratio, s=12, color=colour, marker=marker, lw=0, alpha=0.7, label=method
        )
        singular = np.isin(rows["family"].tolist(), SINGULAR)
        errors = np.sort(np.nan_to_num(np.abs(numbers(rows, "relative_error"))[singular], nan=1.0))
        if len(errors):
            right.step(errors, np.arange(1, len(errors) + 1) / len(errors), where="post", color=colour, label=method)
    left.axhline(1.0, color="black", lw=0.6)
    left.axhspan(0.85, 1.15, color=OTHER, alpha=0.2, lw=0)
    left.set(xscale="log", xlabel=r"true $\lambda$", ylabel=r"$\hat\lambda / \lambda$ (band: ±15 %)", ylim=(0.3, 1.8))
    left.legend(loc="lower right")
    for error, share in TARGETS:
        right.plot(error, share, "+", color="black", ms=9)
    right.set(
        xscale="log", xlabel=r"$|\hat\lambda - \lambda| / \lambda$", ylabel="share of singular models", ylim=(0, 1.02)
    )
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    return figure
