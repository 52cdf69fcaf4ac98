"""The checkpoints of a run: its weights at many steps, and its full state at the newest two.

A run lives in the folder `icl/<run name>` of a store: `<step>.safetensors` (weights only, about 210 kB for the paper's
model), `state-<step>.safetensors` (weights, optimiser moments and whatever else resuming needs; the newest two are
kept) and `config.json`. Each member of an ensemble has a run name, and so a `Checkpoints`, of its own.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from icl.checkpoints.format import Checkpoint, CheckpointError, DamagedCheckpointError, check_layout, decode, encode
from icl.config import ConfigError, Settings
from icl.config.steps import nearest_step
from icl.storage import History, InvalidKeyError, MirroredStore, MissingKeyError, StorageError, Store, check_key
from icl.storage.jsonl import has_step, parse_lines, parse_object
from icl.storage.locks import Held, Holder, exclusive, holder_of

FOLDER = "icl"
SUFFIX = ".safetensors"
STATES_KEPT = 2
RECORDS = ("metrics.jsonl", "summary.json")  # that a tracker keeps beside the checkpoints
ROWS = "rows"  # of metadata of a state: how many rows of metrics came before it
_WEIGHTS = re.compile(r"(0|[1-9][0-9]*)\.safetensors\Z")
_STATE = re.compile(r"state-(0|[1-9][0-9]*)\.safetensors\Z")

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run in a store.

    A writer must hold `lock()`; a reader needs no lock. If a `layout` (name -> shape) is given, every file of weights
    that is loaded must have it. If `expect` was called, every checkpoint must have been made with those settings.
    """

    def __init__(
        self,
        store: Store,
        run_name: str,
        layout: Mapping[str, tuple[int, ...]] | None = None,
        records: Sequence[str] = RECORDS,
        beside: Sequence[str] = (),
    ) -> None:
        """Raise `CheckpointError` if `run_name` cannot be the name of one folder.

        Args:
            records: names of the files that other writers of this machine keep and extend, the metrics first.
            beside: names of subfolders whose files are written once, such as tables.
        """
        if "/" in str(run_name):
            raise CheckpointError(f"the run name {run_name!r} is refused: it must not contain a slash")
        try:
            self.prefix = check_key(f"{FOLDER}/{run_name}")
        except InvalidKeyError as error:
            raise CheckpointError(f"the run name {run_name!r} is refused: {error}") from error
        self.store = store
        self.run_name = run_name
        self.layout = layout
        self._records = tuple(records)
        self._beside = tuple(beside)
        self._states: list[int] | None = None
        self._held: Held | None = None
        self._expected: Settings | None = None
        self._recorded: tuple[int, list[int]] = hash(b""), []  # the metrics' bytes, hashed, and the steps of their rows
        self._fitting: str | None = None  # the last settings, as text, that `_compare` accepted

    # Whose run this is

    def expect(self, settings: Settings) -> Self:
        """Check that this is the run of `settings`, and not another one of the same name.

        The stored settings are compared with `settings` now, and those of every checkpoint when it is read. A run calls
        this before it writes anything.

        Raises:
            CheckpointError: the run was made with other settings; the message names the first of them and both values.
            StorageError: the store cannot be read.
        """
        self._expected = settings
        config = self.settings()
        if config is not None:
            self._compare(config, f"the run {self.run_name}")
        return self

    def settings(self) -> dict[str, Any] | None:
        """The settings that the run was made with, or None if none are stored.

        They are read from config.json. If that is missing or damaged, they are read from the newest state or weights.
        """
        config = self._config_at(self.store)
        if config is not None:
            return config
        try:
            newest = [(self.state_key(step), step, "state") for step in reversed(self.states())]
            newest += [(self.weights_key(step), step, "weights") for step in self.steps()[-1:]]
        except StorageError:
            if not isinstance(self.store, MirroredStore):
                raise
            return None  # the bucket does not answer; whatever is read from it later is compared then
        for key, step, kind in newest:
            with contextlib.suppress(DamagedCheckpointError, MissingKeyError):
                return _config_of(self._read(key, step, kind), key)
        return None

    def _config_at(self, store: Store) -> dict[str, Any] | None:
        try:
            config = parse_object(store.get(self._config_key))
        except MissingKeyError:
            return None
        except StorageError:
            if not isinstance(store, MirroredStore):
                raise
            return None  # it is not in the folder, and the bucket does not answer; `lock` tries again
        if config is not None and self._expected is not None and not config.keys() & set(self._expected.decides):
            config = None  # a JSON object, but not one of settings
        if config is None:
            _log.warning(
                "%s in %s is damaged; the settings that are stored with the checkpoints are used instead",
                self._config_key,
                store,
            )
        return config

    def _compare(self, config: Mapping[str, Any], source: str) -> None:
        assert self._expected is not None
        try:
            self._expected.refuse_another(config, source)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None

    def _compare_remote(self) -> None:
        """Check that the bucket does not hold another run of this name. A bucket that cannot be reached is skipped, because
        nothing is written to it then."""
        if self._expected is not None and isinstance(self.store, MirroredStore):
            with contextlib.suppress(StorageError):
                config = self._config_at(self.store.remote)
                if config is not None:
                    self._compare(config, f"the run {self.run_name} in {self.store.remote}")

    # Weights on the dense grid

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        """Store the weights of `step`; equal weights and metadata give equal bytes.

        Raises:
            StorageError: the store failed.
            CheckpointError: the arguments cannot be stored.
        """
        self.store.put(self.weights_key(step), encode(step, tensors, metadata or {}, "weights"))

    def load(self, step: int) -> dict[str, Tensor]:
        """Return the weights of `step`, on the CPU; raises like `read`."""
        return self.read(step).tensors

    def read(self, step: int) -> Checkpoint:
        """Return weights and metadata of `step`, after checking checksum and layout.

        Raises:
            CheckpointError: there is no such step, or its file is damaged, from another program, from a newer version,
                or of another architecture.
            StorageError: the store cannot be read.
        """
        try:
            return self._read(self.weights_key(step), step, "weights")
        except MissingKeyError as error:
            present = self.steps()
            nearest = f"the nearest is at step {nearest_step(present, step)}" if present else "it has none yet"
            raise CheckpointError(
                f"the run {self.run_name} has no checkpoint at step {step}; {nearest} (`icl runs show {self.run_name}` says more)"
            ) from error

    def read_state(self, step: int) -> Checkpoint:
        """Return the full state of `step`; raises like `read`."""
        try:
            return self._read(self.state_key(step), step, "state")
        except MissingKeyError as error:
            raise CheckpointError(f"the run {self.run_name} has no state {self.state_key(step)}") from error

    def steps(self) -> list[int]:
        """The steps whose weights are stored, ascending."""
        return self._numbers(_WEIGHTS)

    def steps_among(self, names: Iterable[str]) -> list[int]:
        """The steps whose weights are among `names` of files in the run's folder, ascending."""
        return _numbers(_WEIGHTS, names)

    # Full state of the newest steps

    def save_state(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        """Store everything that resuming after `step` needs, then drop all states but this and the one before it.

        States of later steps are dropped too. They must be damaged: a run that is at `step` would have resumed from them.

        Raises:
            RunInUseError: this process has lost the lock; nothing is stored.
        """
        self.confirm_lock()
        data = encode(step, tensors, metadata or {}, "state")
        if self._states is None:
            self._states = self.states()
        # The metrics go first: a run that resumes from this state on another machine does not log them again.
        self.send_records()
        self.store.put(self.state_key(step), data)
        known = sorted({*self._states, step})
        self._keep_states(known, [number for number in known if number <= step][-STATES_KEPT:])

    def keep_last_state(self) -> None:
        """Drop all states but the newest, so that a finished run's files do not depend on when it was interrupted."""
        known = self.states() if self._states is None else self._states
        self._keep_states(known, known[-1:])

    def _keep_states(self, known: Sequence[int], kept: Sequence[int]) -> None:
        self._states = list(kept)
        for number in known:
            if number not in kept:
                try:
                    self.store.delete(self.state_key(number))
                except StorageError as error:
                    _log.warning("an old state is left behind: %s", error)

    def newest_state(self) -> Checkpoint | None:
        """Return the newest undamaged state, or None if there is none. Damaged ones are skipped with a warning.

        Raises:
            CheckpointError: a newer version of this library wrote the state. It is not skipped, because training would
                overwrite it.
        """
        return next(self.whole_states(), None)

    def whole_states(self) -> Iterator[Checkpoint]:
        """The undamaged states, newest first; see `newest_state`."""
        for step in reversed(self.states()):
            try:
                state = self._read(self.state_key(step), step, "state")
            except (DamagedCheckpointError, MissingKeyError) as error:  # its writer may have dropped it just now
                _log.warning("%s; trying the state before it", error)
            else:
                yield state

    def send_records(self, files: Iterable[str] = ()) -> None:
        """Send to the bucket, in the background, what other writers of this machine wrote: `files` of the run's folder, then
        the records, the metrics last."""
        for name in (*files, *reversed(self._records)):
            self.store.send(f"{self.prefix}/{name}")

    def has_metrics_of(self, state: Checkpoint) -> bool:
        """Whether the metrics beside the checkpoints still have all rows that they had when a state was saved."""
        key, rows = self._metrics_key, state.metadata.get(ROWS)
        if not isinstance(rows, int) or rows < 1:
            return True
        try:
            data = self.store.get(key)
        except MissingKeyError:
            data = b""
        if self._recorded[0] != hash(data):  # parsing thousands of rows would be the slowest part of a start
            self._recorded = hash(data), [row["step"] for row in parse_lines(data, key, has_step)]
        return sum(step < state.step for step in self._recorded[1]) >= rows

    def keeps_metrics(self) -> bool:
        """Whether a tracker keeps metrics beside the checkpoints."""
        return self.store.exists(self._metrics_key)

    def states(self) -> list[int]:
        """The steps whose full state is stored, ascending."""
        return self._numbers(_STATE)

    # The run as a whole

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration as readable JSON beside the checkpoints."""
        self.store.put(self._config_key, _readable(config))

    def restore_config(self, config: Mapping[str, Any]) -> None:
        """Write the configuration again if its file is damaged or missing."""
        if self._config_at(self.store) is None:
            self.save_config(config)

    def config(self) -> dict[str, Any] | None:
        """The configuration stored with the run, or None; raises `CheckpointError` if its file is not JSON."""
        return self._read_json("config.json")

    def mark_finished(self, step: int) -> None:
        """Record that `step` was the run's last one."""
        self.store.put(self.finished_key, _readable({"step": step}))

    def finished_step(self) -> int | None:
        """The last step of a finished run; None if the run is not finished or its mark is damaged."""
        try:
            mark = self._read_json("finished.json")
        except CheckpointError as error:
            _log.warning("%s", error)
            return None
        return mark["step"] if mark is not None and has_step(mark) else None

    @contextlib.contextmanager
    def lock(self, wait_s: float = 1.0) -> Iterator[None]:
        """Be the only writer of this run for the length of a `with` block. Leftovers of a killed writer are cleared first.

        The file lock excludes processes of this machine, or of a shared file system with working locks. The claim
        excludes other machines that write to the same bucket. In a mirrored store the copy with the newer state is
        continued; see `MirroredStore` for a remote that cannot be reached.

        Raises:
            RunInUseError: another process holds the run; the message names it.
        """
        subject = f"the run {self.run_name}"
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(exclusive(self.store.lock_path(self.prefix), subject, wait_s))
            self._compare_remote()  # before the claim, so that none is written into another run's folder
            stack.enter_context(self.store.claim(self.prefix).held(subject, wait_s))
            records = [f"{self.prefix}/{name}" for name in self._records]
            beside = [f"{self.prefix}/{name}" for name in self._beside]
            self.store.recover(self.prefix, History(self._progress, records, beside))
            # Only states known now may be dropped: if this machine loses its claim, later ones are another machine's.
            self._states = self.states()
            self._held = held
            try:
                yield
            finally:
                self._states = self._held = None

    def holder(self, everywhere: bool = True) -> Holder | None:
        """The process that is writing this run now, or None. If `everywhere`, the bucket is asked about other machines.

        Raises:
            StorageError: the bucket does not answer.
        """
        here = holder_of(self.store.lock_path(self.prefix))
        return self.store.claim(self.prefix).holder() if here is None and everywhere else here

    def confirm_lock(self) -> None:
        """Raise `RunInUseError` if the lock is known to be lost: its file was removed, or another machine took the run over.
        Makes no request."""
        if self._held is not None:
            self._held.check()
        self.store.claim(self.prefix).confirm()

    def flush(self, timeout_s: float | None = None) -> Sequence[str]:
        """Wait until all files of this run are sent, those of other writers too, and return the keys that are not.

        Only the holder of `lock()` may call this.
        """
        self.send_records()
        self.store.send(self.prefix)
        return self.store.flush(timeout_s)

    def weights_key(self, step: int) -> str:
        """Where the weights of `step` are stored."""
        return f"{self.prefix}/{step}{SUFFIX}"

    def state_key(self, step: int) -> str:
        """Where the state of `step` is stored."""
        return f"{self.prefix}/state-{step}{SUFFIX}"

    @property
    def finished_key(self) -> str:
        """Where the mark of a finished run is stored."""
        return f"{self.prefix}/finished.json"

    @property
    def _config_key(self) -> str:
        return f"{self.prefix}/config.json"

    @property
    def _metrics_key(self) -> str:
        return f"{self.prefix}/{self._records[0]}"

    def _progress(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """How far a copy of this run is: the step of its newest state (-1 without one), then the sizes of the records that
        grow line by line, the metrics first."""
        states = _numbers(_STATE, (key.removeprefix(f"{self.prefix}/") for key in sizes))
        lines = [name for name in self._records if name.endswith(".jsonl")]
        return max(states, default=-1), *(sizes.get(f"{self.prefix}/{name}", 0) for name in lines)

    def history(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """How far the copy of this run with these files is: the updates made, then the sizes as in `_progress`."""
        updates, *lines = self._progress(sizes)
        steps = self.steps_among(key.removeprefix(f"{self.prefix}/") for key in sizes)
        return max([updates, *(step + 1 for step in steps)]), *lines

    def is_weights(self, key: str) -> bool:
        """Whether weights of a step are stored under `key`."""
        return bool(_WEIGHTS.match(key.removeprefix(f"{self.prefix}/")))

    def _numbers(self, pattern: re.Pattern[str]) -> list[int]:
        return _numbers(pattern, (key.removeprefix(f"{self.prefix}/") for key in self.store.list(self.prefix)))

    def check(self, key: str, data: bytes) -> Checkpoint:
        """Return the checkpoint in `data` if it may stand under this run's `key`; raises `CheckpointError` if not."""
        name = key.removeprefix(f"{self.prefix}/")
        if match := _STATE.match(name):
            return self._decode(data, key, int(match[1]), "state")
        if match := _WEIGHTS.match(name):
            return self._decode(data, key, int(match[1]), "weights")
        raise DamagedCheckpointError(f"{key} is not named as a checkpoint of icl; move it away")

    def _read(self, key: str, step: int, kind: str) -> Checkpoint:
        return self._decode(self.store.get(key), key, step, kind)

    def _decode(self, data: bytes, key: str, step: int, kind: str) -> Checkpoint:
        checkpoint = decode(data, key, kind)
        if self.layout is not None and kind == "weights":
            check_layout(checkpoint.tensors, self.layout, key)
        if checkpoint.step != step:
            raise DamagedCheckpointError(f"{key} holds step {checkpoint.step}; if it was renamed, rename it back")
        if self._expected is not None and checkpoint.metadata.get("config") != self._fitting:
            config = _config_of(checkpoint, key)
            if config is not None:
                self._compare(config, key)
                self._fitting = checkpoint.metadata["config"]
        return checkpoint

    def _read_json(self, name: str) -> dict[str, Any] | None:
        key = f"{self.prefix}/{name}"
        try:
            value = parse_object(self.store.get(key))
        except MissingKeyError:
            return None
        if value is None:
            raise CheckpointError(
                f"{key} is not a JSON object; delete it, and it is written again when the run goes on"
            )
        return value


def _config_of(checkpoint: Checkpoint, key: str) -> dict[str, Any] | None:
    """The settings stored with a checkpoint, or None if its writer stored none (only training always does)."""
    text = checkpoint.metadata.get("config")
    if text is None:
        return None
    config = parse_object(text) if isinstance(text, str) else None
    if config is None:
        raise DamagedCheckpointError(f"{key} does not say with which settings it was made; use an earlier one")
    return config


def _numbers(pattern: re.Pattern[str], names: Iterable[str]) -> list[int]:
    return sorted(int(match[1]) for match in map(pattern.match, names) if match)


def _readable(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
