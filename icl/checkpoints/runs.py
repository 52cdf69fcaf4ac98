"""Whole runs: list them, verify their checkpoints, thin them out, copy them between stores."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from icl.checkpoints.format import CheckpointError
from icl.checkpoints.run import FOLDER, SUFFIX, Checkpoints
from icl.config import ConfigError, Training
from icl.config.kinds import training_kind
from icl.storage import MissingKeyError, StorageError, Store
from icl.storage.locks import Holder

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


@dataclass(frozen=True)
class RunSummary:
    """One run, as far as its files show.

    Attributes:
        name: of the run.
        checkpoints: how many steps have stored weights.
        newest_step: the largest of them; None if there are none.
        size: of all its files, in bytes.
        state: `running` (a process holds the run, on this machine or through the bucket), `finished`, or `interrupted`.
        writer: the process that holds the run.
    """

    name: str
    checkpoints: int
    newest_step: int | None
    size: int
    state: Literal["running", "finished", "interrupted"]
    writer: Holder | None = None


@dataclass(frozen=True)
class Problem:
    """A file that failed, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class CopyReport:
    """What a copy did.

    Attributes:
        copied: files written.
        present: files that the destination had already.
        size: bytes written.
        problems: files that could not be copied.
        longer: whether the destination's history was the longer one.
    """

    copied: int
    present: int
    size: int
    problems: tuple[Problem, ...]
    longer: bool = False


def estimates_among(folders: Iterable[str], run: str | None = None) -> list[str]:
    """Those names of folders that belong to estimates, `llc-<run>-<hash>`: of the given run, or of any."""
    pattern = re.compile(rf"llc-{'.+' if run is None else re.escape(run)}-[0-9a-f]{{8}}")
    return sorted(filter(pattern.fullmatch, folders))


def list_folders(store: Store) -> list[str]:
    """The names of all folders of a store in which a run or something else is recorded."""
    return sorted({key.split("/")[1] for key in store.list(FOLDER) if key.count("/") > 1})


def list_runs(store: Store) -> list[RunSummary]:
    """All runs that have begun, by name, from one listing of the store: they have settings or a checkpoint."""
    files: dict[str, dict[str, int]] = defaultdict(dict)
    for key, size in store.sizes(FOLDER).items():
        _, name, *rest = key.split("/", 2)
        if rest:
            files[name][rest[0]] = size
    runs = []
    answers = True
    for name, sizes in sorted(files.items()):
        has_begun = "config.json" in sizes and not estimates_among([name])
        if not has_begun and not any(file.endswith(SUFFIX) for file in sizes):
            continue
        checkpoints = Checkpoints(store, name)
        finished = checkpoints.finished_key.removeprefix(f"{checkpoints.prefix}/") in sizes
        try:
            writer = checkpoints.holder(everywhere=answers and not finished)
        except StorageError:  # a bucket that is silent for one run is so for all
            answers, writer = False, None
        steps = checkpoints.steps_among(sizes)
        state = "running" if writer else "finished" if finished else "interrupted"
        runs.append(RunSummary(name, len(steps), max(steps, default=None), sum(sizes.values()), state, writer))
    return runs


def verify_run(store: Store, name: str, progress: Progress = lambda done, total: None) -> list[Problem]:
    """Read every checkpoint and state of a run, and return those whose checksum, step, layout or settings are wrong.

    The metrics are a problem too if they lack rows that were there when the newest state was saved.
    """
    checkpoints = Checkpoints(store, name)
    problems: list[Problem] = []
    try:
        _training_of(checkpoints)
        state = checkpoints.newest_state()
        if state is not None and not checkpoints.has_metrics_of(state):
            problems.append(
                Problem(f"{checkpoints.prefix}/metrics.jsonl", f"{checkpoints.prefix}/metrics.jsonl lacks rows")
            )
    except (CheckpointError, ConfigError):
        pass  # the loop below finds the file at fault and names it
    keys = [key for key in store.list(checkpoints.prefix) if key.endswith(SUFFIX)]
    for done, key in enumerate(keys):
        progress(done, len(keys))
        try:
            checkpoint = checkpoints.check(key, store.get(key))
        except MissingKeyError:
            continue  # an old state that its owner deleted since the listing
        except (CheckpointError, StorageError) as error:
            problems.append(Problem(key, str(error)))
            continue
        if checkpoints.layout is None and key == checkpoints.weights_key(checkpoint.step):
            # All checkpoints of a run have one architecture, so the first sound one gives the layout.
            checkpoints.layout = {label: tuple(value.shape) for label, value in checkpoint.tensors.items()}
    progress(len(keys), len(keys))
    return problems


def prune_run(
    store: Store, name: str, keep: Collection[int], progress: Progress = lambda done, total: None
) -> list[int]:
    """Delete the weights of every step that is not in `keep`, and return those steps; states stay.

    The run is locked meanwhile. If it is trained again from the start, it writes the deleted checkpoints again.

    Raises:
        RunInUseError: it is being written now.
    """
    checkpoints = Checkpoints(store, name)
    with checkpoints.lock():
        surplus = sorted(set(checkpoints.steps()) - set(keep))
        for done, step in enumerate(surplus):
            progress(done, len(surplus))
            store.delete(checkpoints.weights_key(step))
        progress(len(surplus), len(surplus))
    return surplus


def copy_run(source: Store, destination: Store, name: str, progress: Progress = lambda done, total: None) -> CopyReport:
    """Copy a run, or estimates. Checkpoints that the destination has in the same size are skipped, and damaged ones are not copied.

    If the destination's history is the longer one, its states and records stay, and only missing weights are copied.
    The destination is locked meanwhile; the source may be growing. The mark of a finished run is copied last, and not
    at all after a problem, so that an incomplete copy never looks complete.

    Raises:
        CheckpointError: the destination has another run of this name.
        RunInUseError: the destination's run is being written now.
        StorageError: one of the stores cannot be listed.
    """
    reader, writer = Checkpoints(source, name), Checkpoints(destination, name)
    _refuse_another(reader, writer)
    copied = present = size = 0
    problems: list[Problem] = []
    with writer.lock():
        here, there = source.sizes(reader.prefix), destination.sizes(writer.prefix)
        longer = writer.history(there) > reader.history(here)
        # Metrics after states: a state counts the rows before it, and by then all of these have been written.
        keys = sorted(here, key=lambda key: (key == reader.finished_key, not key.endswith(SUFFIX), key))
        for done, key in enumerate(keys):
            progress(done, len(keys))
            is_checkpoint = key.endswith(SUFFIX)
            stays = longer and not reader.is_weights(key)
            if stays or (is_checkpoint and there.get(key) == here[key]):
                present += 1
                continue
            if key == reader.finished_key and problems:
                continue
            try:
                data = source.get(key)
                if is_checkpoint:
                    reader.check(key, data)
                destination.put(key, data)
            except MissingKeyError:
                continue  # an old state that its owner deleted since the listing
            except (CheckpointError, StorageError) as error:
                problems.append(Problem(key, str(error)))
                continue
            copied, size = copied + 1, size + len(data)
        progress(len(keys), len(keys))
    return CopyReport(copied, present, size, tuple(problems), longer)


def _refuse_another(reader: Checkpoints, writer: Checkpoints) -> None:
    """Refuse to mix two runs of one name."""
    config, there = _training_of(reader), writer.settings()
    if config is not None and there is not None and (difference := config.difference(there)):
        raise CheckpointError(
            f"the run {writer.run_name} in {writer.store} was made with {difference} as in {reader.store}; "
            "move one of the two away"
        )


def _training_of(checkpoints: Checkpoints) -> Training | None:
    """The settings stored with a run that decide its weights, or None. Its checkpoints are compared with them from now on."""
    stored = checkpoints.settings()
    if stored is None:
        return None
    kind = training_kind(stored)
    config = kind.parse({key: stored[key] for key in kind.decides if key in stored})
    checkpoints.expect(config)
    return config


def choose(runs: Sequence[RunSummary], name: str | None) -> list[RunSummary]:
    """The run called `name`, or all.

    Raises:
        ValueError: there is no such run; the message names some that exist.
    """
    if name is None:
        return list(runs)
    chosen = [run for run in runs if run.name == name]
    if not chosen:
        known = ", ".join(run.name for run in runs[:5]) or "none"
        raise ValueError(f"there is no run {name!r}; known runs: {known}{', ...' if len(runs) > 5 else ''}")
    return chosen
