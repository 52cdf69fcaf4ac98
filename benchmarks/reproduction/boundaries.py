"""The section on the stage boundaries that the detector finds."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table
from benchmarks.reproduction.comparison import LOG_TOLERANCE
from benchmarks.reproduction.shipped import Shipped
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.estimation.tables import ESTIMATES
from icl.figures.elements import FIRST_STEP

INNER = dict(list(PUBLISHED_STAGE_ENDS.items())[:-1])
"""Without the last end, the end of training, which no curve shows."""


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    found = pd.concat([run.needed("boundaries") for run in runs])
    found["within"] = found["log_ratio"].abs() <= LOG_TOLERANCE
    having = {name: {stage: _at(found, name, stage) for stage in INNER} for name in ESTIMATES}
    settings = found.groupby("setting")["within"]
    return {
        "boundary_seeds": {name: {stage: len(rows) for stage, rows in each.items()} for name, each in having.items()},
        "boundaries_within": settings.sum().to_dict(),
        "boundaries_found": settings.size().to_dict(),
        "first_step": FIRST_STEP,
        "boundary_chance": _chance(),
        "boundaries_table": _summary(having),
        "every_boundary_table": _every(found, runs),
    }


def _at(found: pd.DataFrame, name: str, stage: str) -> pd.DataFrame:
    """The boundaries that are this published end within the aim."""
    return found[(found["setting"] == name) & (found["published"] == stage) & found["within"]]


def _chance() -> float:
    """That a step drawn uniformly in log t is within the aim of a published end."""
    places = np.geomspace(FIRST_STEP, max(PUBLISHED_STAGE_ENDS.values()), 10_000)
    return float(
        np.mean([any(abs(math.log(place / step)) <= LOG_TOLERANCE for step in INNER.values()) for place in places])
    )


def _summary(having: dict[str, dict[str, pd.DataFrame]]) -> str:
    rows = []
    for stage, step in INNER.items():
        cells = [
            ", ".join(f"{row.model_seed} ({row.step:,.0f})" for row in having[name][stage].itertuples())
            for name in ESTIMATES
        ]
        rows.append([f"{stage}, {step:,}", *(cell or "none" for cell in cells)])
    return markdown_table(
        ["published end", "seeds that have it, published settings", "seeds that have it, calibrated"], rows
    )


def _every(found: pd.DataFrame, runs: Sequence[Shipped]) -> str:
    rows = []
    for run in runs:
        for name in ESTIMATES:
            for row in found[(found["model_seed"] == run.seed) & (found["setting"] == name)].itertuples():
                rows.append([
                    f"`{name}`, seed {run.seed}", f"{row.step:,.0f}", f"{row.low:,.0f} to {row.high:,.0f}", f"{row.probability:.2f}",
                    f"{row.published}, {row.published_step:,.0f}", f"{row.log_ratio:+.2f}", "yes" if row.within else "**no**",
                    "yes" if row.low <= row.published_step <= row.high else "no",
                ])  # fmt: skip
    head = [
        "estimates",
        "step",
        "90 % interval",
        "probability",
        "nearest published end",
        "log ratio",
        "within the aim",
        "interval holds it",
    ]
    return markdown_table(head, rows)
