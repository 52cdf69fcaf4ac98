"""The section on the dense curve of seed 1: λ̂ at every checkpoint that training writes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.detector import INNER, by_the_papers_rule, hits
from benchmarks.pages import markdown_table
from benchmarks.reproduction.shipped import Shipped, detailed
from icl.analysis.stages import find_boundaries
from icl.figures.elements import FIRST_STEP, numbers

THINNED, DENSE = "llc_calibrated", "llc_calibrated_dense"
RULES = ("ours", "the paper's")

Found = tuple[np.ndarray, list[str]]
"""The steps of boundaries, and what the page writes for them."""


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    curves = curves_of(detailed(runs))
    found = {(name, rule): boundaries(table, rule) for name, table in curves.items() for rule in RULES}
    return {
        "dense": {name: described(table) for name, table in curves.items()},
        "dense_found": {name: {rule: found[name, rule][0].tolist() for rule in RULES} for name in curves},
        "dense_number": {name: {rule: len(found[name, rule][0]) for rule in RULES} for name in curves},
        "dense_ends": {name: {rule: published_ends(found[name, rule][0]) for rule in RULES} for name in curves},
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


def boundaries(table: pd.DataFrame, rule: str) -> Found:
    """What a rule finds in a curve."""
    steps, values = numbers(table, "step"), numbers(table, "llc/mean")
    if rule == "ours":
        found = find_boundaries(steps, values, numbers(table, "llc/mcse"))
        rows = zip(found.steps, found.low, found.high, strict=True)
        return found.steps, [f"{step:,.0f} ({low:,.0f} to {high:,.0f})" for step, low, high in rows]
    late = steps >= FIRST_STEP
    places = by_the_papers_rule(steps[late].astype(np.int64), values[late], np.zeros(late.sum()))
    return places, [f"{step:,.0f}" for step in places]


def published_ends(steps: np.ndarray) -> list[str]:
    """The stages of whose published ends one of the steps is within the aim."""
    return [stage for (stage, _), there in zip(INNER, hits(steps).any(axis=0), strict=True) if there]


def _table(found: dict[tuple[str, str], Found], tables: dict[str, pd.DataFrame]) -> str:
    rows = [
        [f"{name}, {len(tables[name])} checkpoints", rule, str(len(steps)), ", ".join(published_ends(steps)) or "none", ", ".join(shown)]
        for (name, rule), (steps, shown) in found.items()
    ]  # fmt: skip
    return markdown_table(["curve", "rule", "boundaries", "published ends among them", "all boundaries"], rows)
