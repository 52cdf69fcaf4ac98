"""The section on the estimates under calibrated settings."""

from collections.abc import Sequence

from benchmarks.pages import markdown_table
from benchmarks.reproduction.changes import llc_changes
from benchmarks.reproduction.comparison import Comparison
from benchmarks.reproduction.shipped import Shipped, detailed, estimate, titles
from benchmarks.reproduction.stages import STAGES
from icl.figures.elements import HEALTHY, UNTESTED

VERDICTS = ["settings", "estimates", "healthy: all tests passed", "passed those that were made", "a test failed"]


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    changes = [llc_changes(run, "llc_calibrated") for run in runs]
    return {
        "calibrated": {stage: Comparison(None, [each[stage].value for each in changes]) for stage in STAGES},
        "calibrated_start": [run.needed("llc_calibrated")["llc/mean"].iloc[0] for run in runs],
        **_chains(detailed(runs)),
        "scale": _scale(runs),
        "trace": Comparison(None, [100 * end / start for _, (start, end) in map(_ends, runs)]),
        "calibrated_table": markdown_table(
            ["Δλ̂ calibrated", *titles(runs)], [[stage, *(str(each[stage]) for each in changes)] for stage in STAGES]
        ),
        "scale_table": _scale_table(runs),
        "verdicts_table": _verdicts_table(runs),
    }


def _chains(shipped: Shipped) -> dict[str, object]:
    """How the chains of one run fare."""
    table = shipped.needed("llc_calibrated")
    useful, peak = table[table["loss/init"] < table["loss/zero"]], table.loc[table["llc/mean"].idxmax()]
    verdicts = table["verdict"].str.split("[:;]|, which").str[0].value_counts()
    return {
        "calibrated_estimates": len(table),
        "calibrated_useful": len(useful),
        "calibrated_above": int((useful["loss/mean"] > useful["loss/zero"]).sum()),
        "calibrated_verdicts": ", ".join(f"{name} ({count})" for name, count in verdicts.items()),
        "calibrated_distance_least": table["distance"].min(),
        "calibrated_distance_most": table["distance"].max(),
        "calibrated_free_distance": shipped.free_distance("llc_calibrated"),
        "calibrated_peak_step": peak["step"],
        "calibrated_peak": estimate(peak),
    }


def _verdicts_table(runs: Sequence[Shipped]) -> str:
    """How many estimates of all seeds are healthy, failed a test, or passed those that were made."""
    tables = {"published": "llc", "calibrated": "llc_calibrated"}
    verdicts = {title: [each for run in runs for each in verdicts_of(run, name)] for title, name in tables.items()}
    return markdown_table(VERDICTS, [verdicts_row(title, each) for title, each in verdicts.items()])


def verdicts_of(run: Shipped, table: str) -> list[str]:
    """Of a table's estimates."""
    return [str(each) for each in run.needed(table)["verdict"]]


def verdicts_row(title: str, verdicts: Sequence[str]) -> list[str]:
    """The cells below `VERDICTS`."""
    healthy, untested = verdicts.count(HEALTHY), sum(each.startswith(UNTESTED) for each in verdicts)
    return [title, str(len(verdicts)), str(healthy), str(untested), str(len(verdicts) - healthy - untested)]


def _ends(run: Shipped) -> tuple[list[float], list[float]]:
    """‖w‖ and tr H at both ends of LR3."""
    ends = [run.boundaries()[stage] for stage in ("LR2", "LR3")]
    traces = run.needed("hessian").set_index("step")["hessian/trace"]
    return run.norms.loc[ends].tolist(), traces.loc[ends].tolist()


def _scale(runs: Sequence[Shipped]) -> Comparison:
    """By how many per cent tr H ‖w‖² changes over LR3, run by run."""
    products = [[trace * norm**2 for norm, trace in zip(*_ends(run), strict=True)] for run in runs]
    return Comparison(None, [100 * (end / start - 1) for start, end in products])


def _scale_table(runs: Sequence[Shipped]) -> str:
    rows = []
    for run, change in zip(runs, _scale(runs).values, strict=True):
        norms, traces = _ends(run)
        rows.append(
            [
                f"seed {run.seed}",
                "{:.0f} to {:.0f}".format(*norms),
                "{:,.0f} to {:,.0f}".format(*traces),
                f"{change:+.0f} %",
            ]
        )
    return markdown_table(["over LR3", "‖w‖", "tr H", "tr H ‖w‖² changes by"], rows)
