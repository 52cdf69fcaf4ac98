"""The section on readings of the published settings: which draws count, and which γ is meant."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.pages import markdown_table, with_error
from benchmarks.reproduction.changes import Changes, burnt_in_llc_changes, llc_changes
from benchmarks.reproduction.comparison import Comparison
from benchmarks.reproduction.published import CHANGE_OF_LLC
from benchmarks.reproduction.shipped import Shipped, detailed
from icl.sampling.presets import PUBLISHED_TABLE

DRAWS: dict[str, Callable[[Shipped, str], Changes]] = {"all draws": llc_changes, "after burn-in": burnt_in_llc_changes}
"""Which draws count -> Δλ̂ of a run and a table."""

GAMMAS = {"code": "llc", "table": "llc_table_gamma"}
"""Whose γ -> the table of the estimates with it."""


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    run = detailed(runs)
    found = {
        gamma: {draws: compared([read(each, table) for each in runs if each.table(table) is not None]) for draws, read in DRAWS.items()}
        for gamma, table in GAMMAS.items()
    }  # fmt: skip
    levels = run.after_burnin(GAMMAS["table"]).set_index("step")["loss/mean"]
    rhat = run.needed(GAMMAS["table"]).set_index("step")["llc/rhat"]
    return {
        "reading": found,
        "literal": burnt_in_llc_changes(run, GAMMAS["table"]),
        "literal_level": {stage: float(levels[step]) for stage, step in run.boundaries().items()},
        "literal_rhat": {stage: float(rhat[step]) for stage, step in run.boundaries().items()},
        "table_burnin": PUBLISHED_TABLE.num_burnin_steps,
        "table_draws": PUBLISHED_TABLE.num_draws,
        "table_gamma": run.sampler(GAMMAS["table"]).localization,
        "code_gamma": PUBLISHED_TABLE.localization,
        "readings_table": _table(run, found),
    }


def compared(changes: Sequence[Changes]) -> dict[str, Comparison]:
    """Stage -> the published Δλ̂ beside those of the runs that have it."""
    return {
        stage: Comparison(published, [each[stage].value for each in changes if stage in each])
        for stage, published in CHANGE_OF_LLC.items()
    }


def _table(run: Shipped, found: Mapping[str, Mapping[str, Mapping[str, Comparison]]]) -> str:
    """Δλ̂ by every reading: mean and spread where there are several seeds, otherwise one seed with its error."""
    heads = [
        f"γ = {run.sampler(table).localization:.1f}, {draws}" for table in GAMMAS.values() for draws in DRAWS
    ]  # fmt: skip
    rows = []
    for stage, published in CHANGE_OF_LLC.items():
        cells = []
        for gamma, table in GAMMAS.items():
            for draws, read in DRAWS.items():
                each, one = found[gamma][draws][stage], read(run, table)[stage]
                several = len(each.values) > 1
                cells.append(
                    with_error(each.mean, each.spread, "+")
                    if several
                    else f"{with_error(one.value, one.error, '+')} (seed {run.seed})"
                )
        rows.append([stage, f"{published:+g}", *cells])
    return markdown_table(["stage", "Δλ̂ published", *heads], rows)
