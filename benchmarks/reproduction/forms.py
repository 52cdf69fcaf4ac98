"""The section on essential dynamics: shares of the variance, and the forms that the detector finds in dense trajectories."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binom

from benchmarks.pages import markdown_table
from benchmarks.reproduction import published
from benchmarks.reproduction.comparison import LOG_TOLERANCE, Comparison
from benchmarks.reproduction.shipped import Shipped
from icl.analysis.geometry import MIN_MOTION
from icl.figures.recipes import forms_of, functional_trajectory


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for; the dense run is one."""
    (dense,) = (run for run in runs if run.table("essential_dynamics") is not None)
    tables = {"essential_dynamics": dense.needed("essential_dynamics")}
    trajectory = functional_trajectory(tables)
    found = forms_of(trajectory)
    if found is None:
        raise ValueError(f"the trajectory of seed {dense.seed} is too coarse for forms")
    chance = _chance(found["step"].to_numpy(), trajectory["step"].max())
    nearest = [_nearest(found, step) for step in published.FORMS]
    hits = sum(_within(row["step"], step) for row, step in zip(nearest, published.FORMS, strict=True))
    return {
        "dense_seed": dense.seed,
        "dense_checkpoints": len(trajectory),
        "dense_every": float(np.median(np.diff(np.sort(trajectory["step"])))),
        "pc": [
            Comparison(share, [float(trajectory[f"explained_variance_ratio/{i}"].iloc[0])])
            for i, share in enumerate(published.EXPLAINED_VARIANCE)
        ],
        "forms_found": len(found),
        "forms_published": len(published.FORMS),
        "forms_within": hits,
        "min_motion": MIN_MOTION,
        "first_form": published.FORMS[0],
        "form_chance": chance,
        "as_many_chance": float(binom.sf(hits - 1, len(published.FORMS), chance)),
        "variance_table": _variance_table(dense, trajectory),
        "forms_table": _table(nearest),
        "every_form_table": _every(found),
    }


def _within(step: float, target: float) -> bool:
    return abs(math.log(step / target)) <= LOG_TOLERANCE


def _nearest(found: pd.DataFrame, step: int) -> pd.Series:
    return found.iloc[int(np.abs(np.log(found["step"].to_numpy(dtype=float) / step)).argmin())]


def _chance(steps: np.ndarray, last: int) -> float:
    """That a step drawn uniformly in log t after the first published form is within the aim of a form of ours."""
    anywhere = np.geomspace(published.FORMS[0], last, 10_000)
    return float((np.abs(np.log(anywhere[:, None] / steps)).min(axis=1) <= LOG_TOLERANCE).mean())


def _variance_table(run: Shipped, trajectory: pd.DataFrame) -> str:
    shares = [trajectory[f"explained_variance_ratio/{i}"].iloc[0] for i in range(len(published.EXPLAINED_VARIANCE))]
    rows = [
        [f"PC {i + 1}", f"{target:.2f}", f"{ours:.2f}"]
        for i, (target, ours) in enumerate(zip(published.EXPLAINED_VARIANCE, shares, strict=True))
    ]
    return markdown_table(["share of the variance", "published", f"seed {run.seed}"], rows)


def _table(nearest: Sequence[pd.Series]) -> str:
    rows = []
    for target, near in zip(published.FORMS, nearest, strict=True):
        reach = f"{near['first_step']:,.0f} to {near['last_step']:,.0f}"
        ratio, within = math.log(near["step"] / target), _within(near["step"], target)
        rows.append(
            [
                f"{target:,}",
                f"{near['step']:,.0f}",
                reach,
                f"{near['spread']:.2f}",
                f"{ratio:+.2f}",
                "yes" if within else "**no**",
            ]
        )
    head = [
        "published form",
        "nearest of ours",
        "its range of influence",
        "planes differ by",
        "log ratio",
        "within the aim",
    ]
    return markdown_table(head, rows)


def _every(found: pd.DataFrame) -> str:
    return markdown_table(
        ["step", *(f"{step:,.0f}" for step in found["step"])],
        [["planes differ by", *(f"{spread:.2f}" for spread in found["spread"])]],
    )
