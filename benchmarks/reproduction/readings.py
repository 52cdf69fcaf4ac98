"""The section on readings of the published settings: which draws count, and which γ is meant."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from benchmarks.pages import markdown_table, with_error
from benchmarks.reproduction.calibrated import verdicts_of
from benchmarks.reproduction.changes import Changes, burnt_in_llc_changes, llc_changes
from benchmarks.reproduction.comparison import Comparison
from benchmarks.reproduction.published import CHANGE_OF_LLC
from benchmarks.reproduction.shipped import Shipped, detailed
from icl.sampling.presets import PUBLISHED_TABLE
from icl.sampling.verdict import RHAT_LIMIT

DRAWS: dict[str, Callable[[Shipped, str], Changes]] = {"all draws": llc_changes, "after burn-in": burnt_in_llc_changes}
"""Which draws count -> Δλ̂ of a run and a table."""

GAMMAS = {"smaller": "llc", "larger": "llc_table_gamma"}
"""The γ of the public code and that of the paper's table -> the estimates with it."""

LATE = ("LR4", "LR5")

Found = Mapping[str, Mapping[str, Mapping[str, Comparison]]]
"""γ -> draws -> stage -> Δλ̂ of the runs."""


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    run, table = detailed(runs), GAMMAS["larger"]
    having = [each for each in runs if each.table(table) is not None]
    found = {
        gamma: {draws: compared([read(each, name) for each in runs if each.table(name) is not None]) for draws, read in DRAWS.items()}
        for gamma, name in GAMMAS.items()
    }  # fmt: skip
    rest = pd.concat([_at_late_ends(each, table) for each in having])
    rows, levels = run.needed(table).set_index("step"), run.after_burnin(table).set_index("step")["loss/mean"]
    return {
        "reading": found,
        "larger_gamma": run.sampler(table).localization,
        "larger_gamma_chains": int(rows["chains"].max()),
        "larger_gamma_level": {stage: float(levels[step]) for stage, step in run.boundaries().items()},
        "larger_gamma_rest": Comparison(None, rest["loss/mean"].tolist()),
        "larger_gamma_rest_number": len(rest),
        "larger_gamma_rhat": float(rest["llc/rhat"].max()),
        "larger_gamma_disagree": int((rest["llc/rhat"] > RHAT_LIMIT).sum()),
        "larger_gamma_verdicts": [verdict for each in having for verdict in verdicts_of(each, table)],
        "smaller_gamma": PUBLISHED_TABLE.localization,
        "table_burnin": PUBLISHED_TABLE.num_burnin_steps,
        "table_draws": PUBLISHED_TABLE.num_draws,
        "readings_table": _table(run, found),
    }


def _at_late_ends(run: Shipped, table: str) -> pd.DataFrame:
    """At the ends of LR4 and LR5: the mean loss of the chains after burn-in, and split R̂ of all draws."""
    after = run.after_burnin(table)[["step", "loss/mean"]].merge(run.needed(table)[["step", "llc/rhat"]], on="step")
    return after[after["step"].isin([run.boundaries()[stage] for stage in LATE])]


def compared(changes: Sequence[Changes]) -> dict[str, Comparison]:
    """Stage -> the published Δλ̂ beside those of the runs that have it."""
    return {
        stage: Comparison(published, [each[stage].value for each in changes if stage in each])
        for stage, published in CHANGE_OF_LLC.items()
    }


def _table(run: Shipped, found: Found) -> str:
    """Δλ̂ by every reading: mean and spread where there are several seeds, otherwise one seed with its error."""
    readings = [(gamma, table, draws) for gamma, table in GAMMAS.items() for draws in DRAWS]
    single = {(table, draws): DRAWS[draws](run, table) for _, table, draws in readings}
    rows = []
    for stage, published in CHANGE_OF_LLC.items():
        cells = []
        for gamma, table, draws in readings:
            every, one = found[gamma][draws][stage], single[table, draws][stage]
            several = f"{with_error(every.mean, every.spread, '+')} ({len(every.values)} seeds)"
            alone = f"{with_error(one.value, one.error, '+')} (seed {run.seed})"
            cells.append(several if len(every.values) > 1 else alone)
        rows.append([stage, f"{published:+g}", *cells])
    heads = [f"γ = {run.sampler(table).localization:.1f}, {draws}" for _, table, draws in readings]
    return markdown_table(["stage", "Δλ̂ published", *heads], rows)
