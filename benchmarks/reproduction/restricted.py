"""The section on restricted learning coefficients: λ̂ where only one group of parameters moves."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table, with_error
from benchmarks.reproduction.calibrated import VERDICTS, verdicts_of, verdicts_row
from benchmarks.reproduction.comparison import Change
from benchmarks.reproduction.shipped import Shipped, detailed
from icl.figures.elements import HEALTHY, UNTESTED
from icl.figures.restricted import EXCLUDED, GROUPS, INCLUDED, Group, grouped, sum_of_parts
from icl.model import InContextRegressionTransformer
from icl.sampling.restriction import restrict

TABLES = {"published": "restricted", "calibrated": "restricted_calibrated", "relative": "restricted_relative"}
"""Setting -> the table of the groups' λ̂ under it."""

COMPLEMENT = "complement_calibrated"
"""The table of λ̂ where all but a group moves."""

PARTS = "sum of the parts"

HEATING_FROM = 3.0
"""Of smaller estimates the noise of the batches is a share that says little."""

Estimates = Mapping[str, pd.DataFrame]
"""The rows of each group by its name, with the step as index."""


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    run = detailed(runs)
    found = {setting: with_sum(grouped(run.needed(table))) for setting, table in TABLES.items()}
    rest = by_group(grouped(run.needed(COMPLEMENT), EXCLUDED))
    return {
        "num_groups": {setting: len(each) - 1 for setting, each in found.items()},
        "num_parts": sum(group.part for group in GROUPS),
        "restricted_sampler": {setting: run.sampler(table) for setting, table in TABLES.items()},
        "restricted_chains": {
            setting: max(int(each) for each in run.needed(table)["chains"]) for setting, table in TABLES.items()
        },
        "restricted_at": {setting: shown_at_ends(run, each) for setting, each in found.items()},
        "restricted_change": {setting: changes_by_group(run, each) for setting, each in found.items()},
        "heating_from": HEATING_FROM,
        "heating_share": _heating_share(run.needed(TABLES["calibrated"])),
        "restricted_table": {setting: groups_table(run, each) for setting, each in found.items()},
        "restricted_number": {setting: len(run.needed(table)) for setting, table in TABLES.items()},
        "restricted_failed": {setting: failures(verdicts_of(run, table)) for setting, table in TABLES.items()},
        "rest": _added(run, found["calibrated"], rest),
        "rest_table": _rest_table(run, found["calibrated"], rest),
        "restricted_verdicts": markdown_table(
            VERDICTS, [verdicts_row(setting, verdicts_of(run, table)) for setting, table in TABLES.items()]
        ),
    }


def _heating_share(table: pd.DataFrame) -> float:
    """The most that the noise of the batches adds to an estimate, in per cent, of estimates above HEATING_FROM."""
    large = table[table["llc/mean"] > HEATING_FROM]
    return float((100 * large["noise/heating"] / large["llc/mean"]).max())


def failures(verdicts: Sequence[str]) -> dict[str, int]:
    """How many estimates failed a test, and of how many the localisation decides."""
    failed = [each for each in verdicts if each != HEALTHY and not each.startswith(UNTESTED)]
    return {"number": len(failed), "decided": sum("the localisation decides" in each for each in failed)}


def by_group(groups: Mapping[Group, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows of each group by its name, with the step as index."""
    return {str(group): rows.set_index("step") for group, rows in groups.items()}


def with_sum(groups: Mapping[Group, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The same, and the sum of the parts."""
    return {**by_group(groups), PARTS: sum_of_parts(dict(groups)).set_index("step")}


def at_ends(run: Shipped, rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Stage -> the estimate at its end, where there is one."""
    return {stage: rows.loc[step] for stage, step in run.boundaries().items() if step in rows.index}


def shown_at_ends(run: Shipped, found: Estimates) -> dict[str, dict[str, str]]:
    """Group -> stage -> λ̂ ± its error at the end of the stage."""
    return {group: {stage: _shown(row) for stage, row in at_ends(run, rows).items()} for group, rows in found.items()}


def changes_by_group(run: Shipped, found: Estimates) -> dict[str, dict[str, Change]]:
    """Group -> stage -> the change of λ̂ over the stage."""
    changes: dict[str, dict[str, Change]] = {}
    stages = list(run.boundaries())
    for group, rows in found.items():
        ends = at_ends(run, rows)
        changes[group] = {
            stage: _difference(ends[stage], ends[before])
            for before, stage in pairwise(stages)
            if before in ends and stage in ends
        }
    return changes


def _difference(one: pd.Series, other: pd.Series) -> Change:
    """Errors are taken for independent."""
    return Change(one["llc/mean"] - other["llc/mean"], float(np.hypot(one["llc/mcse"], other["llc/mcse"])))


def groups_table(run: Shipped, found: Estimates, title: str = "what moves") -> str:
    """λ̂ of every group at the ends of the stages; `title` says what is done with the group."""
    steps = {
        stage: step for stage, step in run.boundaries().items() if any(step in rows.index for rows in found.values())
    }
    model = InContextRegressionTransformer.from_shape(run.config.task_config.shape, seed=0)
    rows = [
        [group, _size(model, estimates), *(cell(ends[stage]) if stage in ends else "" for stage in steps)]
        for group, estimates in found.items()
        if (ends := at_ends(run, estimates))
    ]
    return markdown_table([title, "weights", *(f"end of {stage}, {step:,}" for stage, step in steps.items())], rows)


def _size(model: InContextRegressionTransformer, rows: pd.DataFrame) -> str:
    """How many weights the group has that these rows name."""
    keys = [str(rows[column].iloc[0]) for column in (INCLUDED, EXCLUDED) if column in rows]
    return f"{restrict(model, json.loads(keys[0])).num_moving:,}" if keys else ""


def _shown(row: pd.Series) -> str:
    mean, error = np.asarray([row["llc/mean"], row["llc/mcse"]], dtype=float)
    return with_error(mean, error) if np.isfinite(mean) else "diverged"


def cell(row: pd.Series) -> str:
    """An estimate, with † where a test failed and ° where not all were made."""
    verdict = str(row.get("verdict", HEALTHY))
    mark = "" if verdict == HEALTHY else " °" if verdict.startswith(UNTESTED) else " †"
    return f"{_shown(row)}{mark}"


def _added(run: Shipped, found: Estimates, rest: Estimates) -> dict[str, dict[str, Change]]:
    """Group -> stage -> at its end, λ̂ of everything less that of everything but the group."""
    whole = at_ends(run, found["everything"])
    return {
        group: {stage: _difference(whole[stage], row) for stage, row in at_ends(run, rows).items()}
        for group, rows in rest.items()
    }


def _rest_table(run: Shipped, found: Estimates, rest: Estimates) -> str:
    """Of each group: λ̂ of the group, of all else, and what the group adds."""
    steps = run.boundaries()
    rows = [
        [
            group,
            f"{stage}, {steps[stage]:,}",
            cell(found[group].loc[steps[stage]]),
            cell(rest[group].loc[steps[stage]]),
            str(added),
        ]
        for group, stages in _added(run, found, rest).items()
        for stage, added in stages.items()
    ]
    return markdown_table(["group", "end of", "λ̂ of the group", "λ̂ of all else", "λ̂ of everything less that"], rows)
