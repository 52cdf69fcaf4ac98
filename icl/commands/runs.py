"""`icl runs`: lists, verifies, thins out and copies runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.run import FOLDER
from icl.checkpoints.runs import (
    CopyReport,
    Problem,
    choose,
    copy_run,
    estimates_among,
    list_folders,
    list_runs,
    prune_run,
    verify_run,
)
from icl.commands.dry_run import in_bytes
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
    """Do what `icl runs` was asked to do.

    Returns:
        The exit status: 0, or 1 if a checkpoint is damaged or could not be copied or deleted everywhere.

    Raises:
        ValueError: there is no run `name`, there are two actions at once, or a location is not valid.
    """
    if (verify, prune is not None, copy is not None).count(True) > 1:
        raise ValueError("choose one of --verify, --prune and --copy")
    # Outside a terminal a program reads the table, so its lines must not be folded at 80 columns.
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
            in_bytes(run["size"]), run["state"], run["writer"],
        )  # fmt: skip
    if any(run["remark"] for run in runs):
        table.caption = "(!) this run did not learn; icl runs show RUN says more"
    return table


def _verify(store: Store, name: str | None, console: Console) -> int:
    """Read every checkpoint and report damage. Of a mirrored run both copies are read, because either may be needed alone."""
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
            except StorageError as error:  # go on with the other runs
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
            console.print(f"{run.name} is being written now and was left as it is", soft_wrap=True)
            continue
        kept = spread_in_log_time(Checkpoints(store, run.name).steps(), count)
        with progress_bar(f"prune {run.name}") as update:
            removed = prune_run(store, run.name, kept, lambda done, total, update=update: update(done, total=total))
        console.print(f"{run.name}: kept {len(kept):,} checkpoints, removed {len(removed):,}", soft_wrap=True)
        if removed:
            console.print("  Training this run again would write the removed checkpoints again.", soft_wrap=True)
    return 1 if store.flush() else 0


def _copy(source: Store, destination: Store, name: str | None, console: Console) -> int:
    failed = 0
    # Without a name also the estimates of subjects that icl did not train.
    chosen = [run.name for run in choose(list_runs(source), name)] + estimates_among(list_folders(source), name)
    if not chosen:
        raise ValueError(f"there are no runs in {source}; name the folder or bucket that holds the folder icl")
    for each in chosen:
        try:
            with progress_bar(f"copy {each}") as update:
                report = copy_run(
                    source, destination, each, lambda done, total, update=update: update(done, total=total)
                )
        except (CheckpointError, ConfigError, StorageError) as error:  # go on with the other runs
            report = CopyReport(0, 0, 0, (Problem(each, str(error)),))
        if report.longer:
            console.print(
                f"{each} has a longer history in {destination}: its states and records there stay", soft_wrap=True
            )
        for problem in report.problems:
            console.print(f"not copied: {problem.reason}", style="red", highlight=False, soft_wrap=True)
        failed += len(report.problems)
        console.print(
            f"{each}: {report.copied:,} files ({in_bytes(report.size)}) copied to {destination}, "
            f"{report.present:,} were there, {len(report.problems)} failed",
            soft_wrap=True,
        )
    return 1 if failed else 0
