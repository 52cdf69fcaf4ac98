"""Figures of the accuracy of estimates on models whose learning coefficient is known."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from icl.figures.elements import numbers, rows_where
from icl.figures.style import FULL_WIDTH, HEIGHT, MODEL, OPTIMAL, OTHER, ZERO, page, panels

_LOOK = {"icl": (MODEL, "o"), "devinterp sgld": (ZERO, "^"), "devinterp rmsprop_sgld": (OPTIMAL, "s")}
SINGULAR = ("reduced-rank regression", "deep linear network")
TARGETS = ((0.05, 0.5), (0.15, 0.9))
"""|relative error|, and the share of singular models that should be below it."""


@page()
def accuracy(estimates: pd.DataFrame) -> Figure:
    """Accuracy by sampler. Left: λ̂/λ as a function of λ for every model. Right: the distribution function of |relative error| over
    reduced-rank regressions and deep linear networks. Crosses mark a median of 5 % and a 90th percentile of 15 %.

    Args:
        estimates: one row per model and sampler: `method`, `family`, `coefficient`, `relative_error` (NaN if all chains were lost).
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


@page()
def honesty(rows: pd.DataFrame) -> Figure:
    """The estimate divided by the exact value for every case, by kind of setting and by verdict. Values beyond the axis are at its edge.

    Args:
        rows: one row per case: `kind`, `estimate`, `exact`, `healthy`, `sound` (`benchmarks.llc.honesty`).
    """
    kinds = list(dict.fromkeys(rows.sort_values("sound", ascending=False)["kind"]))
    figure, (axis,) = panels(1, 1, FULL_WIDTH, 1.9 * HEIGHT)
    ratio = np.clip(np.nan_to_num(numbers(rows, "estimate") / numbers(rows, "exact"), nan=20.0), 0.05, 20.0)
    place = np.array([kinds.index(kind) for kind in rows["kind"]])
    shift = (np.arange(len(rows)) * 0.6180339887498949 % 1.0 - 0.5) * 0.6
    for healthy, colour, marker, label in ((False, ZERO, "x", "not healthy"), (True, MODEL, "o", "healthy")):
        chosen = rows["healthy"].to_numpy(dtype=bool) == healthy
        axis.scatter(ratio[chosen], (place + shift)[chosen], s=9, color=colour, marker=marker, lw=0.7, label=label)
    axis.axvspan(0.9, 1.1, color=OTHER, alpha=0.25, lw=0)
    axis.set(
        xscale="log",
        xlabel="estimate / exact value (band: ±10 %)",
        xlim=(0.045, 22),
        yticks=range(len(kinds)),
        yticklabels=kinds,
    )
    axis.invert_yaxis()
    axis.legend(loc="lower right")
    return figure
