"""The section on the model with K = 16 examples, beside those with K = 8."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.pages import markdown_table, with_error
from benchmarks.reproduction.calibrated import VERDICTS, verdicts_of, verdicts_row
from benchmarks.reproduction.comparison import Comparison
from benchmarks.reproduction.restricted import (
    by_group,
    cell,
    changes_by_group,
    failures,
    groups_table,
    shown_at_ends,
    with_sum,
)
from benchmarks.reproduction.shipped import Shipped
from icl.figures.elements import rows_where
from icl.figures.restricted import EXCLUDED, grouped

FOLDER = Path(__file__).parents[2] / "data" / "L2H4Minf-K16"

MEASURED = {"loss": "pretrain/mse", "ridge": "pretrain/delta_ridge", "norm": "weight/norm"}
"""Quantity -> its column of `evals`."""

SETTINGS = {"calibrated": "llc_calibrated", "units of the weights": "llc_relative", "its own sweep file": "llc"}
"""Sampler's setting -> the table of its estimates."""

GROUPS = {"one group moves": "restricted", "all but one group moves": "complement"}


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    (run,) = Shipped.runs(FOLDER)
    groups = with_sum(grouped(run.needed("restricted")))
    rest = by_group(grouped(run.needed("complement"), EXCLUDED))
    return {
        "longer": {
            "config": run.config,
            "seed": run.seed,
            "ends": run.boundaries(),
            "sampler": run.sampler("llc"),
            "groups_sampler": run.sampler("restricted"),
            "chains": int(run.needed("llc")["chains"].max()),
            "groups_chains": int(run.needed("restricted")["chains"].max()),
            "llc": {name: estimates(run, table) for name, table in SETTINGS.items()},
            "number": len(run.needed("llc")),
            "left": sum("left the basin" in each or "diverged" in each for each in verdicts_of(run, "llc")),
            "groups_number": sum(len(run.needed(table)) for table in GROUPS.values()),
            "groups_failed": sum(failures(verdicts_of(run, table))["number"] for table in GROUPS.values()),
            "at": shown_at_ends(run, groups),
            "change": changes_by_group(run, groups),
            "rest_at": shown_at_ends(run, rest),
            "boundaries": boundaries(run),
            **{name: at_ends(run, column) for name, column in MEASURED.items()},
        },
        "shorter": {name: compared(runs, column) for name, column in MEASURED.items()},
        "shorter_llc": {
            stage: Comparison(None, [estimates(each, "llc_calibrated")[stage][0] for each in runs]) for stage in run.boundaries()
        },
        "longer_behaviour_table": behaviour_table(runs, run),
        "longer_llc_table": llc_table(runs, run),
        "longer_verdicts_table": markdown_table(
            VERDICTS,
            [
                verdicts_row(name, verdicts_of(run, table))
                for name, table in {**SETTINGS, **GROUPS}.items()
            ],
        ),
        "longer_groups_table": groups_table(run, groups),
        "longer_rest_table": groups_table(run, rest, "what stays"),
    }  # fmt: skip


def at_ends(run: Shipped, column: str) -> dict[str, float]:
    """Stage -> a column of `evals` at the checkpoint nearest to its end."""
    table = run.needed("evals").set_index("step")[column]
    return {stage: float(table.loc[step]) for stage, step in run.boundaries().items()}


def compared(runs: Sequence[Shipped], column: str) -> dict[str, Comparison]:
    """The same over several runs."""
    each = [at_ends(run, column) for run in runs]
    return {stage: Comparison(None, [ends[stage] for ends in each]) for stage in each[0]}


def estimates(run: Shipped, table: str) -> dict[str, tuple[float, float]]:
    """Stage -> λ̂ and its standard error at the checkpoint nearest to its end, where there is an estimate."""
    rows = run.needed(table).set_index("step")
    return {
        stage: (float(rows.loc[step, "llc/mean"]), float(rows.loc[step, "llc/mcse"]))
        for stage, step in run.boundaries().items()
        if step in rows.index
    }


def behaviour_table(runs: Sequence[Shipped], longer: Shipped) -> str:
    """The loss and the distance to ridge at the stage ends."""
    rows = []
    for stage, step in longer.boundaries().items():
        cells = []
        for column in (MEASURED["loss"], MEASURED["ridge"]):
            shorter = compared(runs, column)[stage]
            cells += [f"{shorter.mean:.3f} ± {shorter.spread:.3f}", f"{at_ends(longer, column)[stage]:.3f}"]
        rows.append([stage, f"{runs[0].boundaries()[stage]:,}", f"{step:,}", *cells])
    return markdown_table(
        [
            "end of", "step, K = 8", "step, K = 16", "ℓ, K = 8", "ℓ, K = 16", "distance to ridge, K = 8",
            "distance to ridge, K = 16",
        ],
        rows,
    )  # fmt: skip


def llc_table(runs: Sequence[Shipped], longer: Shipped) -> str:
    """λ̂ at the stage ends."""
    rows = []
    for stage, step in longer.boundaries().items():
        cells = []
        for name, table in SETTINGS.items():
            if name != "its own sweep file":
                each = [estimates(run, table).get(stage) for run in runs]
                values = Comparison(None, [found[0] for found in each if found])
                cells.append(with_error(values.mean, values.spread) if len(values.values) > 1 else "")
            found = rows_where(longer.needed(table), step=step)
            cells.append(cell(found.iloc[0]) if len(found) else "")
        rows.append([stage, *cells])
    heads = [f"{name}, K = {k}" for name in list(SETTINGS)[:2] for k in (8, 16)]
    return markdown_table(["end of", *heads, "its own sweep file, K = 16"], rows)


def boundaries(run: Shipped) -> Mapping[str, object]:
    """What the detector finds in the calibrated curve."""
    found = rows_where(run.needed("boundaries"), setting="llc_calibrated")
    return {
        "number": len(found),
        "steps": ", ".join(f"{row.step:,.0f} ({row.low:,.0f} to {row.high:,.0f})" for row in found.itertuples()),
    }
