"""A run's results beside those of the runs that differ from it only in their seeds, as a table on W&B."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.run import FOLDER
from icl.config import ConfigError, Training
from icl.config.kinds import parse_training
from icl.execution.surroundings import Surroundings
from icl.storage import MissingKeyError, StorageError, Store
from icl.storage.jsonl import parse_object
from icl.tracking.trackers import SUMMARY
from icl.training import Member

COLUMNS = ("metric", "mean", "sd", "n")


def show_over_seeds(member: Member, summary: Mapping[str, float], place: Surroundings) -> None:
    """Show the table `over_seeds` of a run that has just ended: it and all others that are finished so far.

    The run that ends last shows all of them, wherever the others ran, if they share a folder or a bucket.
    """
    with suppress(StorageError):  # the table is for looking at; the record does not depend on it
        found = dict(summaries_of_seeds(member.config, place.store)) | {member.config.name: summary}
        member.tracker.table("over_seeds", COLUMNS, spread(list(found.values())))


def spread(summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float | None, int]]:
    """Rows of (metric, mean, standard deviation with n - 1, n) over runs, of every number that all of them have.

    One run has no standard deviation.
    """
    names = [name for name in summaries[0] if all(_is_number(summary.get(name)) for summary in summaries)]
    rows = []
    for name in names:
        values = [float(summary[name]) for summary in summaries]
        sd = statistics.stdev(values) if len(values) > 1 else None
        rows.append((name, statistics.fmean(values), sd, len(values)))
    return rows


def summaries_of_seeds(config: Training, store: Store) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and summary of every run in the store that ended and differs from `config` at most in its seeds."""
    begin = f"{config.task_config.label}-seed"
    for name in sorted({key.split("/")[1] for key in store.list(FOLDER)}):
        if config.name.startswith(begin) and not name.startswith(begin):
            continue  # its sizes differ, or it was named by hand; this saves reading the settings of all runs
        with suppress(MissingKeyError, ConfigError, CheckpointError):
            stored = Checkpoints(store, name).settings()
            if stored is None or _without_seeds(parse_training(stored)) != _without_seeds(config):
                continue
            summary = parse_object(store.get(f"{FOLDER}/{name}/{SUMMARY}")) or {}
            # A summary is written at a run's end, and its status a moment later.
            if summary.get("status") in ("finished", "running"):
                yield name, summary


def _without_seeds(config: Training) -> dict[str, Any]:
    identity, seeds = config.identity(), {"model_seed", *config.task_config.derived}
    return {**identity, "task_config": {key: each for key, each in identity["task_config"].items() if key not in seeds}}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
