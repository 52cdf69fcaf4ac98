"""The section on restricted learning coefficients: λ̂ where only one group of parameters moves."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table, with_error
from benchmarks.reproduction.calibrated import VERDICTS, verdicts_of, verdicts_row
from benchmarks.reproduction.comparison import Change
from benchmarks.reproduction.shipped import Shipped, detailed
from icl.figures.elements import HEALTHY, UNTESTED
from icl.figures.restricted import GROUPS, Group, grouped, sum_of_parts
from icl.model import InContextRegressionTransformer
from icl.sampling.restriction import restrict

TABLES = {"published": "restricted", "calibrated": "restricted_calibrated"}
"""Setting -> the table of the groups' λ̂ under it."""

PARTS = "sum of the parts"

HEATING_FROM = 1.0
"""Of smaller estimates the noise of the batches is a share that says little."""

Estimates = Mapping[str, pd.DataFrame]
"""The rows of each group by its name, with the step as index."""


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    run = detailed(runs)
    found = {setting: _estimates(grouped(run.needed(table))) for setting, table in TABLES.items()}
    return {
        "num_groups": {setting: len(each) - 1 for setting, each in found.items()},
        "num_parts": sum(group.part for group in GROUPS),
        "restricted_sampler": {setting: run.sampler(table) for setting, table in TABLES.items()},
        "restricted_chains": {
            setting: max(int(each) for each in run.needed(table)["chains"]) for setting, table in TABLES.items()
        },
        "restricted_at": {setting: _at_ends(run, each) for setting, each in found.items()},
        "restricted_change": {setting: _changes(run, each) for setting, each in found.items()},
        "restricted_before": _before(run),
        "heating_from": HEATING_FROM,
        "heating_share": _heating_share(run.needed(TABLES["calibrated"])),
        "restricted_table": {setting: _table(run, each) for setting, each in found.items()},
        "restricted_number": {setting: len(run.needed(table)) for setting, table in TABLES.items()},
        "restricted_failed": {setting: _failures(verdicts_of(run, table)) for setting, table in TABLES.items()},
        "restricted_verdicts": markdown_table(
            VERDICTS, [verdicts_row(setting, verdicts_of(run, table)) for setting, table in TABLES.items()]
        ),
    }


def _before(run: Shipped) -> str:
    """λ̂ of everything at the end of LR1, under the calibrated settings."""
    return _shown(run.needed("llc_calibrated").set_index("step").loc[run.boundaries()["LR1"]])


def _heating_share(table: pd.DataFrame) -> float:
    """The most that the noise of the batches adds to an estimate, in per cent, of estimates above HEATING_FROM."""
    large = table[table["llc/mean"] > HEATING_FROM]
    return float((100 * large["noise/heating"] / large["llc/mean"]).max())


def _failures(verdicts: Sequence[str]) -> dict[str, int]:
    """How many estimates failed a test, and of how many the localisation decides."""
    failed = [each for each in verdicts if each != HEALTHY and not each.startswith(UNTESTED)]
    return {"number": len(failed), "decided": sum("the localisation decides" in each for each in failed)}


def _estimates(groups: Mapping[Group, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    found = {str(group): rows.set_index("step") for group, rows in groups.items()}
    return {**found, PARTS: sum_of_parts(dict(groups)).set_index("step")}


def _ends(run: Shipped, rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Stage -> the estimate at its end, where there is one."""
    return {stage: rows.loc[step] for stage, step in run.boundaries().items() if step in rows.index}


def _at_ends(run: Shipped, found: Estimates) -> dict[str, dict[str, str]]:
    """Group -> stage -> λ̂ ± its error at the end of the stage."""
    return {group: {stage: _shown(row) for stage, row in _ends(run, rows).items()} for group, rows in found.items()}


def _changes(run: Shipped, found: Estimates) -> dict[str, dict[str, Change]]:
    """Group -> stage -> the change of λ̂ over the stage."""
    changes: dict[str, dict[str, Change]] = {}
    stages = list(run.boundaries())
    for group, rows in found.items():
        ends = _ends(run, rows)
        changes[group] = {
            stage: _difference(ends[stage], ends[before])
            for before, stage in pairwise(stages)
            if before in ends and stage in ends
        }
    return changes


def _difference(one: pd.Series, other: pd.Series) -> Change:
    """Errors are taken for independent."""
    return Change(one["llc/mean"] - other["llc/mean"], float(np.hypot(one["llc/mcse"], other["llc/mcse"])))


def _table(run: Shipped, found: Estimates) -> str:
    """λ̂ of every group at the ends of the stages."""
    steps = {
        stage: step for stage, step in run.boundaries().items() if any(step in rows.index for rows in found.values())
    }
    model = InContextRegressionTransformer.from_shape(run.config.task_config.shape, seed=0)
    sizes = {str(group): f"{restrict(model, group.patterns).num_moving:,}" for group in GROUPS}
    rows = [
        [group, sizes.get(group, ""), *(_cell(ends[stage]) if stage in ends else "" for stage in steps)]
        for group, rows in found.items()
        if (ends := _ends(run, rows))
    ]
    return markdown_table(
        ["what moves", "weights", *(f"end of {stage}, {step:,}" for stage, step in steps.items())], rows
    )


def _shown(row: pd.Series) -> str:
    mean, error = np.asarray([row["llc/mean"], row["llc/mcse"]], dtype=float)
    return with_error(mean, error)


def _cell(row: pd.Series) -> str:
    """An estimate, with † where a test failed and ° where not all were made."""
    verdict = str(row.get("verdict", HEALTHY))
    mark = "" if verdict == HEALTHY else " °" if verdict.startswith(UNTESTED) else " †"
    return f"{_shown(row)}{mark}"
