"""The section on the dense curve of seed 1: λ̂ at every checkpoint that training writes.

    python -m benchmarks.reproduction.dense

finds the boundaries and writes them to benchmarks/results/dense_boundaries.csv, from which the page has them: the detector's random curves
differ from machine to machine.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.detector import FAMILY, INNER, by_the_papers_rule, hits
from benchmarks.pages import markdown_table, rows_of
from benchmarks.reproduction.shipped import Shipped, detailed
from icl.analysis.stages import find_boundaries
from icl.figures.elements import FIRST_STEP, numbers, rows_where
from icl.storage.files import write_atomically

THINNED, DENSE = "llc_calibrated", "llc_calibrated_dense"
RULES = ("ours", "the paper's")
RESULTS = Path(__file__).parents[1] / "results" / "dense_boundaries.csv"


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    curves, found = curves_of(detailed(runs)), pd.read_csv(RESULTS)
    steps = {
        (name, rule): numbers(rows_where(found, curve=name, rule=rule), "step") for name in curves for rule in RULES
    }
    return {
        "dense": {name: described(table) for name, table in curves.items()},
        "dense_found": {name: {rule: steps[name, rule].tolist() for rule in RULES} for name in curves},
        "dense_number": {name: {rule: len(steps[name, rule]) for rule in RULES} for name in curves},
        "dense_ends": {name: {rule: published_ends(steps[name, rule]) for rule in RULES} for name in curves},
        "dense_boundaries_table": _table(found, curves),
    }


def curves_of(run: Shipped) -> dict[str, pd.DataFrame]:
    """What the curves are called in the page -> their estimates."""
    thinned, dense = run.needed(THINNED), run.needed(DENSE)
    others = pd.DataFrame(dense[~dense["step"].isin(thinned["step"])])
    return {"thinned": thinned, "the others": others, "all": dense}


def described(table: pd.DataFrame) -> dict[str, object]:
    """How many estimates a curve has, how many of them are healthy, where it is largest, and where it is smallest after that."""
    peak, least = (table.loc[place] for place in (table["llc/mean"].idxmax(), _least(table)))
    return {
        "number": len(table),
        "healthy": int((table["verdict"] == "healthy").sum()),
        "peak_step": int(peak["step"]),
        "peak": float(peak["llc/mean"]),
        "least_step": int(least["step"]),
        "least": float(least["llc/mean"]),
    }


def _least(table: pd.DataFrame) -> int:
    """The place of the smallest estimate after the largest."""
    after = table.loc[table["step"] > table.loc[table["llc/mean"].idxmax(), "step"]]
    return int(after["llc/mean"].idxmin())


def boundaries(curves: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per boundary: `curve`, `rule`, `step`, and for our rule `low` and `high`, its 90 % interval."""
    rows = []
    for name, table in curves.items():
        steps, values = numbers(table, "step"), numbers(table, "llc/mean")
        found = find_boundaries(steps, values, numbers(table, "llc/mcse"))
        for step, low, high in zip(found.steps, found.low, found.high, strict=True):
            rows.append({"curve": name, "rule": "ours", "step": step, "low": low, "high": high})
        late = steps >= FIRST_STEP
        for step in by_the_papers_rule(steps[late].astype(np.int64), values[late], np.zeros(late.sum())):
            rows.append({"curve": name, "rule": "the paper's", "step": step})
    return pd.DataFrame(rows).round(0)


def published_ends(steps: np.ndarray) -> list[str]:
    """The stages of whose published ends one of the steps is within the aim."""
    return [stage for (stage, _), there in zip(INNER, hits(steps).any(axis=0), strict=True) if there]


def _table(found: pd.DataFrame, curves: dict[str, pd.DataFrame]) -> str:
    rows = []
    for name, table in curves.items():
        for rule in RULES:
            own = rows_where(found, curve=name, rule=rule)
            shown = [
                f"{row.step:,.0f}" + (f" ({row.low:,.0f} to {row.high:,.0f})" if rule == "ours" else "")
                for row in rows_of(own)
            ]
            ends = ", ".join(published_ends(numbers(own, "step"))) or "none"
            rows.append([f"{name}, {len(table)} checkpoints", rule, str(len(own)), ends, ", ".join(shown)])
    return markdown_table(["curve", "rule", "boundaries", "published ends among them", "all boundaries"], rows)


if __name__ == "__main__":
    made = boundaries(curves_of(detailed(Shipped.runs(FAMILY))))
    write_atomically(RESULTS, made.to_csv(index=False).encode())
    print(made.to_string(index=False))
