"""The section on two readings of the published settings: all draws, as the public code takes them, or those after the burn-in."""

from collections.abc import Callable, Sequence

from benchmarks.pages import markdown_table, with_error
from benchmarks.reproduction.changes import Changes, burnt_in_llc_changes, llc_changes
from benchmarks.reproduction.comparison import Comparison
from benchmarks.reproduction.published import CHANGE_OF_LLC
from benchmarks.reproduction.shipped import Shipped
from icl.sampling.presets import PUBLISHED_TABLE

READINGS: dict[str, Callable[[Shipped], Changes]] = {"code": llc_changes, "table": burnt_in_llc_changes}


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    found = {name: compared([read(run) for run in runs]) for name, read in READINGS.items()}
    rows = [
        [stage, f"{published:+g}", *(with_error(each[stage].mean, each[stage].spread, "+") for each in found.values())]
        for stage, published in CHANGE_OF_LLC.items()
    ]
    return {
        "reading": found,
        "table_burnin": PUBLISHED_TABLE.num_burnin_steps,
        "table_draws": PUBLISHED_TABLE.num_draws,
        "table_gamma": 2 * PUBLISHED_TABLE.localization,
        "code_gamma": PUBLISHED_TABLE.localization,
        "readings_table": markdown_table(
            ["stage", "Δλ̂ published", "all draws (the code)", "after burn-in (the table)"], rows
        ),
    }


def compared(changes: Sequence[Changes]) -> dict[str, Comparison]:
    """Stage -> the published Δλ̂ beside those of the runs."""
    return {
        stage: Comparison(published, [each[stage].value for each in changes])
        for stage, published in CHANGE_OF_LLC.items()
    }
