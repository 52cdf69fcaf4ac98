"""`icl report`: chooses the runs, writes their report, and lists the commands that continue them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.checkpoints.run import FOLDER
from icl.checkpoints.runs import list_runs
from icl.config import ConfigError
from icl.config.sweeps import YAML, load_sweep
from icl.estimation.kept import estimates_of
from icl.execution.opened import Run, open_run
from icl.execution.points import llc_points, says_how_to_sample, training_points
from icl.execution.progress import progress_bar
from icl.report import Material, gather, write_report
from icl.report.page import quoted
from icl.storage import local_root, store_from_environment

CHECKPOINTS = 9
"""Number of checkpoints in the proposed command for estimates. Finding stages needs eight."""


def report_command(
    what: Sequence[str],
    output: Path,
    data: Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Write the report of runs, of sweeps, or of all runs; returns its path.

    Raises:
        ConfigError: there is no such run, no run of a sweep has begun, or there is nothing to report.
        ValueError: the output is a folder.
    """
    if output.is_dir():
        raise ValueError(f"{output} is a folder; give --output a file, such as {output / 'report.html'}")
    runs = chosen_runs(what, overrides, environ)
    with progress_bar("reading", len(runs)) as update:
        material = gather(runs, data if data.is_dir() else None, lambda done, note: update(done, note))
    if material.metrics.empty and material.estimates.empty and not sum(material.runs["checkpoints"]):
        raise ConfigError(
            f"nothing to report: {_listed([run.name for run in runs])} has no checkpoint, no metrics and no estimates yet; train it first"
        )
    root = runs[0].results.parent
    elsewhere = None if root.resolve() == local_root(environ).resolve() else root
    size = write_report(material, output, continuing(material, what, overrides, output, elsewhere))
    print(f"{output} ({size / 1e6:.1f} MB): open it in a browser")
    return output


def chosen_runs(what: Sequence[str], overrides: Sequence[str], environ: Mapping[str, str]) -> list[Run]:
    """The runs that the given names, folders and sweep files mean, each once; all runs if nothing is given.

    Raises:
        ConfigError: there is no such run, or no run at all.
    """
    store, results = store_from_environment(environ), local_root(environ) / FOLDER
    if not what:
        every = [Run(run.name, store, results) for run in list_runs(store)]
        if not every:
            raise ConfigError(f"nothing to report: there are no runs in {store}; train one with: icl train SWEEP.yaml")
        return every
    if overrides and not any(Path(each).suffix in YAML for each in what):
        raise ConfigError("--set chooses among the runs of a sweep file; give one")
    runs: dict[tuple[str, Path], Run] = {}
    for each in what:
        if Path(each).suffix in YAML:
            found = [
                run for name in _names(each, overrides, environ) if _left_something(run := Run(name, store, results))
            ]
            if not found:
                raise ConfigError(f"nothing to report: no run of {each} has begun; start it with: icl train {each}")
        elif os.sep not in each and estimates_of(each, results):
            found = [Run(each, store, results)]  # a subject that icl did not train may have estimates only
        else:
            found = [open_run(each, environ)]
        runs |= {(run.name, run.results): run for run in found}
    return list(runs.values())


def continuing(
    material: Material, what: Sequence[str], overrides: Sequence[str], output: Path, root: Path | None = None
) -> list[tuple[str, str]]:
    """Commands that continue from here, as pairs (what it does, the command line).

    They go on with unfinished runs, add estimates and measurements, and write the page again.

    Args:
        material: the content of the report.
        what: names, folders and sweep files, as the user gave them.
        overrides: the overrides of the sweep files.
        output: the file of the page.
        root: the folder to which LOCAL_ROOT must be set for these runs; None if it is set to it.
    """
    table = material.runs
    trained = [str(name) for name in table.loc[table["state"] != "estimates only", "name"]]
    unfinished = [str(name) for name in table.loc[table["state"].isin(["interrupted", "running"]), "name"]]
    place = f"LOCAL_ROOT={quoted(str(root))} " if root is not None else ""
    settings = [word for text in overrides for word in ("--set", text)]
    sweeps = [each for each in what if Path(each).suffix in YAML]
    lines: list[tuple[str, str]] = []
    for sweep in sweeps:
        loaded = load_sweep(sweep)
        if unfinished and loaded.runs is None:
            lines.append(
                (f"Train on: {len(unfinished)} of the runs are not finished.", quoted("icl", "train", sweep, *settings))
            )
        own = loaded.runs is not None or says_how_to_sample(loaded, overrides)
        preset = [] if own else ["--preset", "automatic", "--checkpoints", str(CHECKPOINTS)]
        lines.append(
            (
                "Estimate λ̂ at the remaining checkpoints." if own else "Estimate λ̂ at checkpoints spread in log t.",
                quoted("icl", "llc", sweep, *preset, *settings),
            )
        )
        lines.append(("Collect everything in tables.", quoted("icl", "tabulate", sweep, *settings)))
    if trained and not sweeps:
        if unfinished:
            lines.append((f"Not finished: {_listed(unfinished)}. Start the sweep file again.", "icl train SWEEP.yaml"))
        listed = ", ".join(json.dumps(name) for name in trained)
        file = f"runs: [{listed}]\nparameters: {{preset: {{value: automatic}}, checkpoints: {{value: {CHECKPOINTS}}}}}"
        lines.append(("Estimate λ̂: save this as llc.yaml, then run the next line.", file))
        lines.append(("", "icl llc llc.yaml"))
    measured = set(material.attention["run"]) if len(material.attention) else set()
    left = [name for place, name in enumerate(table["name"]) if place not in measured and str(name) in trained]
    lines += [(f"Measure attention and structure of {name}.", quoted("icl", "analyse", str(name))) for name in left[:1]]
    lines.append(("Write this page again.", quoted("icl", "report", *what, *settings, "--output", str(output))))
    return [(does, place + line if line.startswith("icl ") else line) for does, line in lines]


def _names(sweep: str, overrides: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    loaded = load_sweep(sweep)
    if loaded.runs is not None or says_how_to_sample(loaded, overrides):
        names = [config.subject_name for config in llc_points(loaded, overrides, environ)]
    else:
        names = [config.name for config in training_points(loaded, overrides)]
    return list(dict.fromkeys(names))


def _left_something(run: Run) -> bool:
    return run.checkpoints.settings() is not None or bool(run.estimate_sets)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
