"""The section on two readings of the published settings: all draws, as the public code takes them, or those after the burn-in."""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.pages import markdown_table, with_error
from benchmarks.reproduction.changes import Changes, burnt_in_llc_changes, llc_changes
from benchmarks.reproduction.published import CHANGE_OF_LLC
from benchmarks.reproduction.shipped import Shipped
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.sampling.presets import PUBLISHED_TABLE

READINGS: dict[str, Callable[[Shipped], Changes]] = {"code": llc_changes, "table": burnt_in_llc_changes}


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    found = {name: [read(run) for run in runs] for name, read in READINGS.items()}
    means = {
        name: {stage: float(np.mean([changes[stage].value for changes in each])) for stage in PUBLISHED_STAGE_ENDS}
        for name, each in found.items()
    }
    rows = []
    for stage, published in CHANGE_OF_LLC.items():
        cells = []
        for each in found.values():
            values = [changes[stage].value for changes in each]
            cells.append(with_error(float(np.mean(values)), float(np.std(values, ddof=1)), "+"))
        rows.append([stage, f"{published:+g}", *cells])
    miss = {
        name: {stage: abs(mean - CHANGE_OF_LLC[stage]) for stage, mean in each.items()} for name, each in means.items()
    }
    return {
        "reading": means,
        "reading_miss": miss,
        "table_burnin": PUBLISHED_TABLE.num_burnin_steps,
        "table_draws": PUBLISHED_TABLE.num_draws,
        "table_gamma": 2 * PUBLISHED_TABLE.localization,
        "code_gamma": PUBLISHED_TABLE.localization,
        "nearer_to_code": ", ".join(
            stage for stage in PUBLISHED_STAGE_ENDS if miss["code"][stage] < miss["table"][stage]
        ),
        "readings_table": markdown_table(
            ["stage", "Δλ̂ published", "all draws (the code)", "after burn-in (the table)"], rows
        ),
    }
