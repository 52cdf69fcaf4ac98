"""`icl runs`: what it prints about runs, and what it does with them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from icl.checkpoints import CheckpointError
from icl.checkpoints.run import FOLDER
from icl.checkpoints.runs import (
    CopyReport,
    Problem,
    choose,
    copy_run,
    list_runs,
    prune_run,
    verify_run,
)
from icl.commands.run_things import act, overview
from icl.config import ConfigError
from icl.config.steps import spread_in_log_time
from icl.execution.progress import progress_bar
from icl.storage import LocalStore, MirroredStore, StorageError, Store, local_root, open_store, store_from_environment


def runs_command(
    verify: bool,
    prune: int | None,
    copy: tuple[str, str] | None,
    name: str | None,
    environ: Mapping[str, str] = os.environ,
    console: Console | None = None,
    action: str | None = None,
    names: Sequence[str] = (),
    output: Path | None = None,
    yes: bool = False,
) -> int:
    """The exit status of `icl runs`: 0, or 1 if a checkpoint is damaged, or could not be copied or deleted everywhere.

    Raises:
        ValueError: there is no run `name`, two actions at once, or a location that is none.
    """
    if (verify, prune is not None, copy is not None).count(True) > 1:
        raise ValueError("choose one of --verify, --prune and --copy")
    # A table that is read by a program, not a person, must not be folded at 80 columns.
    console = console or Console(width=None if Console().is_terminal else 250)
    if copy is not None:
        return _copy(open_store(copy[0]), open_store(copy[1]), name, console)
    store = store_from_environment(environ)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise ValueError(f"there is no {store}; set LOCAL_ROOT to the folder in which runs are stored")
    if verify:
        return _verify(store, name, console)
    if prune is not None:
        return _prune(store, name, prune, console)
    if action is not None:
        return act(action, names, output, yes, console, environ)
    console.print(_table(overview(choose(list_runs(store), name), store, local_root(environ) / FOLDER), store))
    return 0


def _table(runs: Sequence[Mapping[str, Any]], store: Store) -> Table:
    table = Table(title=f"{len(runs)} runs in {store}", title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("date", no_wrap=True)
    table.add_column("what differs", overflow="fold")
    for heading in ("steps", "last loss", "checkpoints", "estimates", "size"):
        table.add_column(heading, justify="right")
    table.add_column("state")
    table.add_column("written by")
    for run in runs:
        loss = f"{run['last_loss']} (!)" if run["remark"] else run["last_loss"]
        table.add_row(
            run["run"], run["date"], run["settings"], run["steps"], loss, f"{run['checkpoints']:,}", f"{run['estimates']:,}",
            _size(run["size"]), run["state"], run["writer"],
        )  # fmt: skip
    if any(run["remark"] for run in runs):
        table.caption = "(!) it did not learn: icl runs show RUN says more"
    return table


def _verify(store: Store, name: str | None, console: Console) -> int:
    """Both copies of a mirrored run are read: one that is never needed until the other is gone must be sound too."""
    places: list[Store] = [store.local, store.remote] if isinstance(store, MirroredStore) else [store]
    choose(list_runs(store), name)
    damaged = 0
    for place in places:
        for run in list_runs(place):
            if name not in (None, run.name):
                continue
            try:
                with progress_bar(f"verify {run.name}") as update:
                    problems = verify_run(place, run.name, lambda done, total, update=update: update(done, total=total))
            except StorageError as error:  # it must not keep the others from being read
                problems = [Problem(run.name, str(error))]
            for problem in problems:
                console.print(f"damaged: {problem.reason}", style="red", highlight=False, soft_wrap=True)
            damaged += len(problems)
            verdict = f"{len(problems)} damaged" if problems else "all sound"
            console.print(f"{run.name} in {place}: {run.checkpoints:,} checkpoints, {verdict}", soft_wrap=True)
    return 1 if damaged else 0


def _prune(store: Store, name: str | None, count: int, console: Console) -> int:
    for run in choose(list_runs(store), name):
        if run.state == "running":
            console.print(f"{run.name}: is being written, left as it is", soft_wrap=True)
            continue
        kept = spread_in_log_time(_steps(store, run.name), count)
        with progress_bar(f"prune {run.name}") as update:
            removed = prune_run(store, run.name, kept, lambda done, total, update=update: update(done, total=total))
        console.print(f"{run.name}: kept {len(kept):,} checkpoints, removed {len(removed):,}", soft_wrap=True)
        if removed:
            console.print("  Training this run again would write the removed ones anew.", soft_wrap=True)
    return 1 if store.flush() else 0


def _copy(source: Store, destination: Store, name: str | None, console: Console) -> int:
    failed = 0
    chosen = choose(list_runs(source), name)
    if not chosen:
        raise ValueError(f"there are no runs in {source}; name the folder or bucket that holds the folder icl")
    for run in chosen:
        try:
            with progress_bar(f"copy {run.name}") as update:
                report = copy_run(
                    source, destination, run.name, lambda done, total, update=update: update(done, total=total)
                )
        except (CheckpointError, ConfigError, StorageError) as error:  # it must not keep the others from being copied
            report = CopyReport(0, 0, 0, (Problem(run.name, str(error)),))
        if report.longer:
            console.print(f"{run.name} is further in {destination}: its states and records stay", soft_wrap=True)
        for problem in report.problems:
            console.print(f"not copied: {problem.reason}", style="red", highlight=False, soft_wrap=True)
        failed += len(report.problems)
        console.print(
            f"{run.name}: {report.copied:,} files ({_size(report.size)}) copied to {destination}, "
            f"{report.present:,} were there, {len(report.problems)} failed",
            soft_wrap=True,
        )
    return 1 if failed else 0


def _steps(store: Store, name: str) -> list[int]:
    from icl.checkpoints import Checkpoints

    return Checkpoints(store, name).steps()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit always returns")
