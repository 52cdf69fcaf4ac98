"""The section on the models with K = 16 examples, beside those with K = 8. The first seed is shown in detail."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mode

from benchmarks.pages import markdown_table, rows_of, with_error
from benchmarks.reproduction.calibrated import VERDICTS, verdicts_of, verdicts_row
from benchmarks.reproduction.comparison import Comparison
from benchmarks.reproduction.restricted import by_group, cell, failures, groups_table, shown_at_ends, with_sum
from benchmarks.reproduction.shipped import Shipped
from icl.figures.elements import numbers, rows_where
from icl.figures.restricted import EXCLUDED, grouped

FOLDER = Path(__file__).parents[2] / "data" / "L2H4Minf-K16"

MEASURED = {"loss": "pretrain/mse", "ridge": "pretrain/delta_ridge", "norm": "weight/norm"}
"""Quantity -> its column of `evals`."""

COMPARED = {"calibrated": "llc_calibrated", "units of the weights": "llc_relative"}
"""Settings of the sampler that both models have -> the table of the estimates."""

OWN = "its own sweep file"
SETTINGS = {**COMPARED, OWN: "llc"}

GROUPS = {"one group moves": "restricted", "all but one group moves": "complement"}


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    own = Shipped.runs(FOLDER)
    first = own[0]
    groups = with_sum(grouped(first.needed("restricted")))
    rest = by_group(grouped(first.needed("complement"), EXCLUDED))
    verdicts = {run.seed: all_verdicts(run) for run in own}
    return {
        "sixteen": {run.seed: measured(run) for run in own},
        "sixteen_verdicts": verdicts,
        "sixteen_first": {
            "config": first.config,
            "seed": first.seed,
            "sampler": first.sampler(SETTINGS[OWN]),
            "chains": int(first.needed(SETTINGS[OWN])["chains"].max()),
            "groups_sampler": first.sampler("restricted"),
            "groups_chains": int(first.needed("restricted")["chains"].max()),
            "at": shown_at_ends(first, groups),
            "groups_passed": sum(
                len(verdicts[first.seed][name]) - failures(verdicts[first.seed][name])["number"] for name in GROUPS
            ),
        },
        "eight": {
            "peak": mode([peak(each) for each in runs]),
            "peaks": [peak(each) for each in runs],
            "boundaries": [boundaries(each) for each in runs],
            "llc": over_runs(runs, COMPARED["calibrated"]),
            "relative": over_runs(runs, COMPARED["units of the weights"]),
            **{name: compared(runs, column) for name, column in MEASURED.items()},
        },
        "sixteen_behaviour_table": behaviour_table(runs, own),
        "sixteen_llc_table": llc_table(runs, own),
        "sixteen_verdicts_table": markdown_table(
            VERDICTS,
            [
                verdicts_row(f"{name}, seed {seed}", each)
                for seed, found in verdicts.items()
                for name, each in found.items()
            ],
        ),
        "sixteen_groups_table": groups_table(first, groups),
        "sixteen_rest_table": groups_table(first, rest, "what stays"),
    }


def measured(run: Shipped) -> dict[str, object]:
    """What one seed shows."""
    tables = {name: table for name, table in SETTINGS.items() if run.table(table) is not None}
    relative = run.needed(COMPARED["units of the weights"])
    return {
        "peak": peak(run),
        "llc": {name: estimates(run, table) for name, table in tables.items()},
        "ess": numbers(relative, "llc/ess").tolist(),
        "boundaries": boundaries(run),
        **{name: at_ends(run, column) for name, column in MEASURED.items()},
    }


def all_verdicts(run: Shipped) -> dict[str, list[str]]:
    """Setting -> the verdicts of its estimates, of all settings that the seed has."""
    tables = {**SETTINGS, **GROUPS}
    return {name: verdicts_of(run, table) for name, table in tables.items() if run.table(table) is not None}


def peak(run: Shipped) -> int:
    """The step with the largest calibrated λ̂."""
    table = run.needed(COMPARED["calibrated"])
    return int(numbers(table, "step")[numbers(table, "llc/mean").argmax()])


def at_ends(run: Shipped, column: str) -> dict[str, float]:
    """Stage -> a column of `evals` at the checkpoint nearest to its end."""
    table = run.needed("evals")
    found = dict(zip(table["step"], numbers(table, column), strict=True))
    return {stage: float(found[step]) for stage, step in run.boundaries().items()}


def compared(runs: Sequence[Shipped], column: str) -> dict[str, Comparison]:
    """The same over several runs."""
    each = [at_ends(run, column) for run in runs]
    return {stage: Comparison(None, [ends[stage] for ends in each]) for stage in each[0]}


def estimates(run: Shipped, table: str) -> dict[str, tuple[float, float]]:
    """Stage -> λ̂ and its standard error at the checkpoint nearest to its end, where there is an estimate."""
    rows = run.needed(table)
    found = dict(zip(rows["step"], zip(numbers(rows, "llc/mean"), numbers(rows, "llc/mcse"), strict=True), strict=True))
    return {stage: found[step] for stage, step in run.boundaries().items() if step in found}


def over_runs(runs: Sequence[Shipped], table: str) -> dict[str, Comparison]:
    """Stage -> λ̂ of the runs that have an estimate at its end."""
    each = [estimates(run, table) for run in runs]
    return {
        stage: Comparison(None, [ends[stage][0] for ends in each if stage in ends]) for stage in runs[0].boundaries()
    }


def boundaries(run: Shipped) -> Mapping[str, object]:
    """What the detector finds in the calibrated curve."""
    found = rows_where(run.needed("boundaries"), setting=COMPARED["calibrated"])
    return {
        "number": len(found),
        "places": numbers(found, "step").tolist(),
        "steps": ", ".join(f"{row.step:,.0f} ({row.low:,.0f} to {row.high:,.0f})" for row in rows_of(found)),
    }


def behaviour_table(runs: Sequence[Shipped], own: Sequence[Shipped]) -> str:
    """The loss and the distance to ridge at the stage ends."""
    columns = {"ℓ": MEASURED["loss"], "distance to ridge": MEASURED["ridge"]}
    rows = []
    for stage, step in own[0].boundaries().items():
        cells = []
        for column in columns.values():
            eight = compared(runs, column)[stage]
            cells += [
                f"{eight.mean:.3f} ± {eight.spread:.3f}",
                *(f"{at_ends(run, column)[stage]:.3f}" for run in own),
            ]
        rows.append([stage, f"{runs[0].boundaries()[stage]:,}", f"{step:,}", *cells])
    heads = ["step, K = 8", "step, K = 16", *_heads(columns, own)]
    return markdown_table(["end of", *heads], rows)


def llc_table(runs: Sequence[Shipped], own: Sequence[Shipped]) -> str:
    """λ̂ at the stage ends."""
    rows = []
    for stage, step in own[0].boundaries().items():
        cells = []
        for table in COMPARED.values():
            eight = over_runs(runs, table)[stage]
            several = with_error(eight.mean, eight.spread) if len(eight.values) > 1 else ""
            cells += [several, *(_cell(run, table, step) for run in own)]
        rows.append([stage, *cells, _cell(own[0], SETTINGS[OWN], step)])
    heads = [*_heads(COMPARED, own), f"{OWN}, seed {own[0].seed}"]
    return markdown_table(["end of", *heads], rows)


def _heads(columns: Iterable[str], own: Sequence[Shipped]) -> list[str]:
    kinds = ["K = 8", *(f"K = 16, seed {run.seed}" for run in own)]
    return [f"{name}, {kind}" for name in columns for kind in kinds]


def _cell(run: Shipped, table: str, step: int) -> str:
    found = rows_where(run.needed(table), step=step)
    return cell(found.iloc[0]) if len(found) else ""
