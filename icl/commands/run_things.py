"""`icl runs show|compare|export|rename|delete`: actions on single runs."""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.run import FOLDER
from icl.checkpoints.runs import RunSummary, choose, estimates_among, list_folders, list_runs
from icl.config import ConfigError, Training
from icl.config.settings import dotted
from icl.config.varying import varying
from icl.estimation.kept import Estimates
from icl.estimation.traces import read_estimates
from icl.execution.closing import estimate_text, in_short, short_name
from icl.execution.health import loss_name
from icl.execution.opened import Run, open_run, together
from icl.storage import LocalStore, StorageError, Store, local_root, store_from_environment
from icl.storage.files import explain, write_atomically, write_table
from icl.tracking.trackers import METRICS

ACTIONS = {"show": 1, "compare": 2, "export": 0, "rename": 2, "delete": 1}
"""Action -> the fewest run names that it needs."""


def act(
    action: str,
    names: Sequence[str],
    output: Path | None,
    yes: bool,
    console: Console,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Do one of ACTIONS; returns the exit status.

    Raises:
        ConfigError: the action is unknown, there are too few names, or there is no such run.
        RunInUseError: a run that is to be renamed or deleted is being written.
    """
    if action not in ACTIONS:
        raise ConfigError(f"icl runs has no action {action!r}; known actions: {', '.join(ACTIONS)}")
    if len(names) < ACTIONS[action] or (action == "rename" and len(names) != 2):
        raise ConfigError(
            f"icl runs {action} needs {ACTIONS[action]} {'run names' if ACTIONS[action] > 1 else 'run name'}"
        )
    if action == "rename":
        rename(open_run(names[0], environ), names[1])
    elif action == "delete":
        return delete([_with_estimates(name, environ) for name in names], yes)
    elif action == "export":
        export([open_run(name, environ) for name in names] or _all_with_settings(environ), output)
    elif action == "show":
        for name in names:
            show(open_run(name, environ), console)
    else:
        compare([open_run(name, environ) for name in names], console)
    return 0


def overview(summaries: Sequence[RunSummary], store: Store, results: Path) -> list[dict[str, Any]]:
    """One row per run: `run`, `date`, `settings` (those that differ between the runs), `steps`, `last_loss`, `checkpoints`,
    `estimates`, `state`, `size`, `writer`, `remark`."""
    runs = [Run(summary.name, store, results) for summary in summaries]
    known = [_settings(run) for run in runs]
    plain = [
        {} if each is None else each.without_derived_seeds().model_dump(mode="json", include=set(each.decides))
        for each in known
    ]
    differing = varying([each for each in plain if each])
    rows = []
    for run, summary, settings, each in zip(runs, summaries, known, plain, strict=True):
        flat = dotted(each)
        rows.append(
            {
                "run": run.name,
                "date": _date(results / run.name),
                "settings": ", ".join(f"{short_name(key, differing)} {flat[key]}" for key in differing if key in flat),
                "steps": f"{0 if summary.newest_step is None else summary.newest_step + 1:,}"
                + (f" of {settings.num_steps:,}" if settings else ""),
                "last_loss": _last_loss(run, settings),
                "checkpoints": summary.checkpoints,
                "estimates": sum(len(found.rows) for found in run.estimate_sets),
                "state": summary.state,
                "size": summary.size,
                "writer": str(summary.writer or ""),
                "remark": str(run.summary.get("remark", "")),
            }
        )
    return rows


def show(run: Run, console: Console) -> None:
    """Print one run: its state, all settings that differ from their defaults, and its estimates."""
    row = overview(choose(list_runs(run.store), run.name), run.store, run.results)[0]
    for label, key in (
        ("run", "run"),
        ("date", "date"),
        ("steps", "steps"),
        ("state", "state"),
        ("last loss", "last_loss"),
    ):
        console.print(f"{label}: {row[key]}", highlight=False, soft_wrap=True)
    console.print(f"checkpoints: {', '.join(map(str, run.steps))}", highlight=False, soft_wrap=True)
    if row["remark"]:
        console.print(f"remark: {row['remark']}", highlight=False, soft_wrap=True)
    defaults = dotted(type(run.settings).parse({}).model_dump(mode="json"))
    own = dotted(run.settings.without_derived_seeds().model_dump(mode="json"))
    changed = {key: value for key, value in own.items() if defaults.get(key) != value and key != "run_name"}
    console.print("settings (others are defaults, `icl config`):", highlight=False, soft_wrap=True)
    for key, value in changed.items():
        console.print(f"  {key}={json.dumps(value)}", highlight=False, soft_wrap=True)
    for found in run.estimate_sets:
        console.print(f"estimates {found.name} {found.preset}".rstrip() + ":", highlight=False, soft_wrap=True)
        for estimate in read_estimates(found.folder):
            verdict = in_short(str(estimate.get("verdict", "")))
            console.print(
                f"  step {estimate['step']:,}: {estimate_text(estimate)}, {verdict}", highlight=False, soft_wrap=True
            )


def compare(runs: Sequence[Run], console: Console) -> None:
    """Print a table of the settings that differ between runs, and of their steps, last losses, checkpoints and estimates."""
    settings = [run.settings.without_derived_seeds().model_dump(mode="json") for run in runs]
    table = Table("", *(run.name for run in runs))
    for key in varying(settings):
        table.add_row(key, *(str(dotted(each).get(key, "-")) for each in settings))
    rows = [overview(choose(list_runs(run.store), run.name), run.store, run.results)[0] for run in runs]
    for label, key in (
        ("steps", "steps"),
        ("last loss", "last_loss"),
        ("checkpoints", "checkpoints"),
        ("estimates", "estimates"),
    ):
        table.add_row(label, *(str(row[key]) for row in rows))
    console.print(table)


def export(runs: Sequence[Run], output: Path | None) -> None:
    """Write settings, metrics and estimates of runs as CSV files into a folder. Without a folder, print the settings as CSV."""
    tables = together(runs)
    if output is None:
        tables.config.to_csv(sys.stdout, index=False)
        return
    if elsewhere := [run.name for run in runs if not (run.results / run.name / METRICS).exists()]:
        _say(f"{', '.join(elsewhere)}: no metrics on this machine; icl runs --copy gets those that are in a bucket")
    for name, table in (("runs", tables.config), ("metrics", tables.metrics), ("estimates", tables.estimates)):
        if len(table):
            write_table(table, output / f"{name}.csv")
            print(output / f"{name}.csv")


def rename(run: Run, new: str) -> None:
    """Give a run and its estimates another name. From then on, sweep files find it by `run_name`.

    Raises:
        ConfigError: the name is taken or not valid, or the run is also in a bucket.
        RunInUseError: the run is being written.
    """
    if not isinstance(run.store, LocalStore):
        raise ConfigError(f"{run.name} is also in a bucket, where nothing can be renamed; copy it with icl runs --copy")
    type(run.settings).parse(
        {**run.settings.model_dump(mode="json"), "run_name": new}
    )  # refuses a name that is not valid
    moves = {
        run.name: new,
        **{found.name: found.name.replace(f"llc-{run.name}-", f"llc-{new}-", 1) for found in run.estimate_sets},
    }
    for name in moves.values():
        if (run.results / name).exists():
            raise ConfigError(f"there is a run {name} already; choose another name")
    with _locked(run.store, moves):
        for old, name in moves.items():
            path = run.results / old / "config.json"
            if path.exists():
                renamed = {**json.loads(path.read_text()), "run_name": new}
                write_atomically(path, (json.dumps(renamed, indent=2, sort_keys=True) + "\n").encode())
            os.rename(run.results / old, run.results / name)
    print(f"{run.name} is now {new}; sweep files find it by run_name: {{value: {new}}}")


@dataclass(frozen=True)
class Doomed:
    """What `delete` deletes together: a run with its estimates, or estimates alone.

    Attributes:
        name: of the run, or of the estimates.
        what: the same in words, for the question.
        folders: the names of their folders, in the order in which they go.
        store, results: where their files are.
    """

    name: str
    what: str
    folders: Sequence[str]
    store: Store
    results: Path


def _with_estimates(name: str, environ: Mapping[str, str]) -> Doomed:
    """A run with its estimates, or the estimates of this name alone.

    Raises:
        ConfigError: there is neither.
    """
    store, results = store_from_environment(environ), local_root(environ) / FOLDER
    if "/" not in name and estimates_among([name]) and not Checkpoints(store, name).steps():
        found = Estimates(results / name)
        if found.folder.is_dir() or name in list_folders(store):
            return Doomed(name, f"the estimates {name} in {store}", [name], store, results)
    run = open_run(name, environ)
    summary = choose(list_runs(run.store), run.name)[0]
    local = [found.name for found in run.estimate_sets]
    estimates = sorted({*estimates_among(list_folders(run.store), run.name), *local})
    what = f"{run.name}: {summary.checkpoints:,} checkpoints and {len(estimates)} sets of estimates in {run.store}"
    return Doomed(run.name, what, [*estimates, run.name], run.store, run.results)


def delete(chosen: Sequence[Doomed], yes: bool) -> int:
    """Delete runs with their checkpoints and estimates, or estimates alone, in the folder and in the bucket, after asking.

    Returns:
        The exit status: 0, or 1 if something could not be deleted in the bucket.

    Raises:
        RunInUseError: a run or estimates are being written.
        StorageError: a folder cannot be deleted.
    """
    status = 0
    for each in chosen:
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(
                    f"nothing is deleted without confirmation: icl runs delete {each.name} --yes deletes {each.what}"
                )
            if _answer(f"delete {each.what}? [y/N] ") not in ("y", "yes"):
                print("left as it is")
                continue
        with _locked(each.store, each.folders):
            for name in each.folders:
                # The settings go last: while they are there, the run is found and can be deleted again.
                keys = each.store.list(f"{FOLDER}/{name}")
                for key in sorted(keys, key=lambda key: key.endswith("/config.json")):
                    each.store.delete(key)
            left = each.store.flush()
        for name in each.folders:
            _remove(each.results / name)
        if left:
            _say(f"{len(left):,} files of {each.name} are still in the bucket; delete it again when it answers")
            status = 1
        else:
            print(f"deleted {each.what}")
    return status


def _answer(question: str) -> str:
    try:
        return input(question).strip().lower()
    except EOFError:  # Ctrl-D
        print()
        return ""


def _all_with_settings(environ: Mapping[str, str]) -> list[Run]:
    """All runs whose settings this version can read."""
    store, results = store_from_environment(environ), local_root(environ) / FOLDER
    every = [Run(summary.name, store, results) for summary in list_runs(store)]
    if unread := [run.name for run in every if _settings(run) is None]:
        _say(f"the settings of {', '.join(unread)} cannot be read; left out")
    return [run for run in every if run.name not in unread]


@contextlib.contextmanager
def _locked(store: Store, names: Iterable[str]) -> Iterator[None]:
    """Be the only writer of several runs or estimates."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(Checkpoints(store, name).lock())
        yield


def _remove(folder: Path) -> None:
    """Delete a folder; if it is a link to a folder on another disk, both."""
    try:
        if folder.is_dir():
            shutil.rmtree(folder.resolve())
        if folder.is_symlink():
            folder.unlink()
    except OSError as error:
        raise StorageError(f"cannot delete {folder}: {explain(error)}") from error


def _say(text: str) -> None:
    print(f"icl: {text}", file=sys.stderr)


def _settings(run: Run) -> Training | None:
    try:
        return run.settings
    except (CheckpointError, ConfigError, StorageError):  # damaged, of another version, or without settings
        return None


def _date(folder: Path) -> str:
    """When a run's folder was last written to, to the minute."""
    times = (
        [path.stat().st_mtime for path in folder.glob("*") if not re.match(r"\.", path.name)] if folder.is_dir() else []
    )
    return datetime.fromtimestamp(max(times)).strftime("%Y-%m-%d %H:%M") if times else "-"


def _last_loss(run: Run, settings: Training | None) -> str:
    name = "batch/loss" if settings is None else loss_name(settings)
    value = run.summary.get(name)
    if value is None:
        rows = run.metrics
        column = name if name in rows.columns else "batch/loss"
        logged = rows[column].dropna().tolist() if column in rows.columns else []
        value = logged[-1] if logged else None
    return "-" if value is None else f"{value:,.4g}"
