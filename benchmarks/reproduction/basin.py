"""The section on where the chains of the published estimator were."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table
from benchmarks.reproduction.shipped import Shipped, detailed, estimate
from icl.analysis.climb import estimates_within
from icl.analysis.stages import PUBLISHED_STAGE_ENDS

LONG_PARTS = 4
"""Into how many windows the draws of the long chains are cut."""


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    shipped = detailed(runs)
    windows = _windows(shipped)
    return {
        "seed": shipped.seed,
        "checkpoint": shipped.boundaries(),
        **_climb(shipped),
        **_turned_over(shipped),
        **_distances(shipped),
        "long_factor": shipped.last_draw("llc_long_traces") / shipped.last_draw(),
        "long_parts": LONG_PARTS,
        "long_chains": int(shipped.needed("llc_long")["chains"].max()),
        "windows": dict(zip(("LR3", "LR4", "LR5"), _window_changes(windows), strict=True)),
        "basin_table": _chains_table(shipped),
        "long_table": _long_table(windows, shipped.last_draw("llc_long_traces")),
    }


def _climb(shipped: Shipped) -> dict[str, object]:
    """When chains are half way to the loss of predicting 0, and past it."""
    whole, half = shipped.crossings(1.0), shipped.crossings(0.5)
    medians = half.groupby("step")["crossing"].median()
    ends, late = shipped.boundaries(), shipped.second_half.set_index("step")["loss/mean"]
    return {
        "num_useful": whole["step"].nunique(),
        "num_chains": len(whole),
        "num_crossed": int(whole["crossing"].notna().sum()),
        "stretch": int(shipped.needed("llc_traces")["draw"].min()),
        "half_way_first": medians.min(),
        "half_way_last": medians.max(),
        "crossing": {stage: median_crossing(shipped, stage) for stage in PUBLISHED_STAGE_ENDS if stage != "LR1"},
        "late_level": {stage: float(late[ends[stage]]) for stage in PUBLISHED_STAGE_ENDS},
    }


def median_crossing(shipped: Shipped, stage: str) -> float:
    """When chains from the end of a stage become worse than predicting 0; those that never do count as later than any."""
    crossings = shipped.crossings(1.0)
    draws = crossings.loc[crossings["step"] == shipped.boundaries()[stage], "crossing"]
    return float(draws.fillna(math.inf).median())


def _turned_over(shipped: Shipped) -> dict[str, object]:
    """How λ̂ follows from the loss of the weights up to the end of LR2."""
    young, level = _young(shipped)
    return {
        "num_young": len(young),
        "level": level,
        "level_range": float(np.ptp(young["loss/mean"])),
        "loss_range": float(np.ptp(young["loss/init"])),
        "deviation": deviation(shipped),
    }


def _young(shipped: Shipped) -> tuple[pd.DataFrame, float]:
    """Estimates up to the end of LR2, and the mean loss of their chains."""
    llc = shipped.needed("llc")
    young = llc[llc["step"] <= shipped.boundaries()["LR2"]]
    return young, float(young["loss/mean"].mean())


def deviation(shipped: Shipped) -> float:
    """How far λ̂ is from the loss turned over, at most, up to the end of LR2."""
    young, level = _young(shipped)
    predicted = shipped.sampler("llc").inverse_temperature * (level - young["loss/init"])
    return float((young["llc/mean"] - predicted).abs().max())


def _distances(shipped: Shipped) -> dict[str, object]:
    """How far chains end from their start, and how long the weights are themselves."""
    distance, norms = shipped.needed("llc")["distance"], shipped.norms
    return {
        "distance_least": distance.min(),
        "distance_most": distance.max(),
        "free_distance": shipped.free_distance("llc"),
        "norm": {stage: float(norms[step]) for stage, step in shipped.boundaries().items()},
    }


def _chains_table(shipped: Shipped) -> str:
    """One row per estimate: where its chains were."""
    half, whole, norms = shipped.crossings(0.5), shipped.crossings(1.0), shipped.norms
    late, calibrated = shipped.second_half.set_index("step"), shipped.needed("llc_calibrated").set_index("step")
    rows = []
    for step, row in shipped.needed("llc").set_index("step").iterrows():
        rows.append([
            f"{step:,}", f"{norms[step]:.0f}", f"{row['loss/init']:.3f}", f"{row['loss/mean']:.3f}",
            *(_reach(way.loc[way["step"] == step, "crossing"]) for way in (half, whole)),
            estimate(row), estimate(late.loc[step]), estimate(calibrated.loc[step]) if step in calibrated.index else "not sampled",
        ])  # fmt: skip
    head = [
        "step",
        "‖w‖",
        "L(w)",
        "E[L]",
        "half way",
        "worse than 0",
        "λ̂ published settings",
        "λ̂ second half",
        "λ̂ calibrated",
    ]
    return markdown_table(head, rows)


def _reach(draws: pd.Series) -> str:
    """First to last, and how many never."""
    if draws.empty:
        return "w is no better"
    never = int(draws.isna().sum())
    known = f"{draws.min():,.0f} to {draws.max():,.0f}" if never < len(draws) else ""
    return known + (f", {never} of {len(draws)} never" if never else "")


def _windows(shipped: Shipped) -> list[pd.DataFrame]:
    """Estimates of the long chains from one part of their draws after another."""
    estimates, traces = shipped.needed("llc_long"), shipped.needed("llc_long_traces")
    return [estimates_within(traces, estimates, k / LONG_PARTS, (k + 1) / LONG_PARTS) for k in range(LONG_PARTS)]


def _window_changes(windows: Sequence[pd.DataFrame]) -> np.ndarray:
    """(stages, windows): between neighbouring checkpoints."""
    return np.diff(np.array([window["llc/mean"] for window in windows]), axis=1).T


def _long_table(windows: Sequence[pd.DataFrame], last_draw: int) -> str:
    steps, size = windows[0]["step"], last_draw // LONG_PARTS
    rows = [[f"{step:,}", *(estimate(window.iloc[i]) for window in windows)] for i, step in enumerate(steps)]
    for (start, end), changes in zip(pairwise(steps), _window_changes(windows), strict=True):
        rows.append([f"{start:,} to {end:,}", *(f"{change:+.1f}" for change in changes)])
    return markdown_table(["step", *(f"draws {k * size + 1:,} to {(k + 1) * size:,}" for k in range(LONG_PARTS))], rows)
