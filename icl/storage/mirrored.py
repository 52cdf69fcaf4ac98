"""A folder whose contents also go to a remote store, in the background."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icl.storage.claims import Claim, NoClaim
from icl.storage.keys import InvalidKeyError, MissingKeyError, StorageError
from icl.storage.local import LocalStore
from icl.storage.locks import RunInUseError
from icl.storage.store import History, Store

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Task:
    """One thing to do at the remote.

    Attributes:
        verb: `put` or `delete` one key, or `complete` a folder: send all that the remote lacks of it.
        data: the value, only if the local folder could not take it.
        not_before: earliest time for it, on the monotonic clock.
    """

    verb: Literal["put", "delete", "complete"]
    data: bytes | None = None
    not_before: float = 0.0


class MirroredStore:
    """Writes to `local`, then to `remote` in the background; reads `local` first.

    A `put` waits for the local disk only. The queue holds names, not values: an upload reads its value back from the
    folder, so a remote that fails for days costs no memory. A value is held in memory only if the folder refuses it,
    up to `max_held_bytes`. A `put` beyond that waits at most `max_block_s` seconds for room and then raises.

    Failed uploads are repeated, with growing pauses, until they succeed. An outage is logged once when it begins and
    once when it ends. Deletes reach the remote after all uploads, so the remote always has a state: the new one arrives
    before the old one goes. What a killed process had not sent is sent after the next start, through `recover`.

    `recover` continues the copy with the longer history. If the remote cannot be reached, the folder is continued
    alone. The remote's copy stays as it is until the folder's history is at least as long. So work may be done twice,
    but none is lost.

    A process that holds a folder's claim (`claim`) and loses it to another machine must not write there any more. Every
    later `put` or `delete` there raises `RunInUseError`, and what was not sent stays in the local folder.
    """

    def __init__(
        self,
        local: LocalStore,
        remote: Store,
        *,
        max_held_bytes: int = 256 * 2**20,
        max_block_s: float = 5.0,
        first_pause_s: float = 1.0,
        longest_pause_s: float = 60.0,
    ) -> None:
        self.local = local
        self.remote = remote
        self._max_held_bytes = max_held_bytes
        self._max_block_s = max_block_s
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._changed = threading.Condition()
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self._undecided: dict[str, History] = {}  # folders (ending in a slash) whose two copies are not compared yet
        self._worker: threading.Thread | None = None
        self._failures = 0  # in a row
        self._last_error = ""
        self._flushing = 0
        self._local_failed = False
        self._listing_failed = False

    def __str__(self) -> str:
        return f"{self.local} and {self.remote}"

    def put(self, key: str, data: bytes) -> None:
        self._confirm(key)
        try:
            self.local.put(key, data)
        except InvalidKeyError:
            raise
        except StorageError as error:
            self._say_local_failed(error)
            self._hold(key, data, error)
        else:
            self._enqueue(key, _Task("put"))

    def get(self, key: str) -> bytes:
        with self._changed:
            task = self._tasks.get(key)
        if task is not None and task.data is not None:
            return task.data
        try:
            return self.local.get(key)
        except InvalidKeyError:
            raise
        except StorageError as error:
            if (task is not None and task.verb == "delete") or self._is_undecided(key):
                raise MissingKeyError(f"there is no {key} in {self}") from error
            return self.remote.get(key)

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes at both places. If the remote fails: those in the folder alone, or an error if the folder is empty."""
        here = self._sizes_here(prefix)
        before = self._deleted()
        try:
            there = {} if self._is_undecided(_below(prefix)) else self.remote.sizes(prefix)
            self._listing_failed = False
        except StorageError as error:
            # The folder is empty and the bucket silent: the run may be in the bucket, so "nothing" would be wrong.
            if not here:
                raise
            if not self._listing_failed:
                self._listing_failed = True
                _log.warning("%s; going on with what is in %s", error, self.local)
            there = {}
        after = self._deleted()
        # A deletion that was sent while the listing was made may or may not show in it.
        there = {key: size for key, size in there.items() if key not in before}
        return {key: size for key, size in sorted((there | here).items()) if key not in after}

    def _deleted(self) -> set[str]:
        """Keys whose deletion the remote has not confirmed yet."""
        with self._changed:
            return {key for key, task in self._tasks.items() if task.verb == "delete"}

    def delete(self, key: str) -> None:
        self._confirm(key)
        try:
            self.local.delete(key)
        except InvalidKeyError:
            raise
        except StorageError as error:
            self._say_local_failed(error)
        self._enqueue(key, _Task("delete"))

    def exists(self, key: str) -> bool:
        if self.local.exists(key):
            return True
        with self._changed:
            task = self._tasks.get(key)
        if task is not None and (task.verb == "delete" or task.data is not None):
            return task.verb == "put"
        return not self._is_undecided(key) and self.remote.exists(key)

    def recover(self, prefix: str, history: History | None = None) -> None:
        """Clear what a killed writer left in the folder, and send what it had not sent, in the background.

        With a `history`, the remote's records are copied to the folder first, if the remote is ahead of the folder or
        the folder lacks them. So is what the folder lacks of the files beside them.
        """
        self.local.recover(prefix)
        if history is not None:
            try:
                self._fetch_beside(prefix, history)
                records = self._records_ahead(prefix, history)
            except StorageError as error:
                self._leave_undecided(prefix, history, error)
            else:
                with self._changed:
                    self._undecided.pop(_below(prefix), None)
                for key, data in records.items():
                    self.local.put(key, data)
        # Names with a leading slash are not valid keys, so the task takes no value's place in the queue.
        self._enqueue(f"/{prefix}", _Task("complete"))

    def put_longer(self, key: str, data: bytes) -> None:
        here = self._sizes_here(key.rpartition("/")[0])
        if here.get(key, 0) <= len(data):
            self.put(key, data)

    def send(self, key: str) -> None:
        if self.local.exists(key):
            self._enqueue(key, _Task("put"))
        elif not self._is_undecided(_below(key)):
            self._enqueue(f"/{key}", _Task("complete"))

    def flush(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """Wait until everything is sent, and return the keys that are not.

        It gives up after `timeout_s` seconds, or after three failures in a row. It then logs what is left, with the
        reason. What is left stays in the folder and is sent when the run is started again.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._flushing += 1
            self._failures = min(self._failures, 1)
            given_up_at = self._failures + 3
            for task in self._tasks.values():
                task.not_before = 0.0
            self._changed.notify_all()
            while self._next() and self._failures < given_up_at:
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    break
                self._start_worker()
                self._changed.wait(remaining)
            self._flushing -= 1
            left = dict(self._tasks)
        unsent = {key: task for key, task in left.items() if task.verb != "complete"}
        for key in left.keys() - unsent.keys():
            # The remote could not be asked what it has of this folder, so all of it counts as unsent.
            unsent |= {name: _Task("put") for name in self.local.list(key.removeprefix("/")) if name not in left}
        if unsent:
            self._report(list(unsent.values()))
        return tuple(unsent)

    def lock_path(self, prefix: str) -> Path:
        return self.local.lock_path(prefix)

    def claim(self, prefix: str) -> Claim | NoClaim:
        return self.remote.claim(prefix)

    def _confirm(self, key: str) -> None:
        self.remote.claim(key.rpartition("/")[0]).confirm()

    # Two copies of a folder

    def _sizes_here(self, prefix: str) -> dict[str, int]:
        with self._changed:
            held = {key: len(task.data) for key, task in self._tasks.items() if task.data is not None}
        return self.local.sizes(prefix) | {key: size for key, size in held.items() if key.startswith(_below(prefix))}

    def _is_undecided(self, key: str) -> bool:
        return key.startswith(tuple(self._undecided))

    def _leave_undecided(self, prefix: str, history: History, error: StorageError) -> None:
        with self._changed:
            self._undecided[_below(prefix)] = history
            if not self._failures:
                _log.warning(
                    "%s. The run goes on with what is in %s; what %s holds of it stays as it is until it can be read",
                    error, self.local, self.remote,
                )  # fmt: skip
            # The outage has been reported. The worker will meet it too and must not report it again.
            self._failures, self._last_error = max(self._failures, 1), str(error)

    def _fetch_beside(self, prefix: str, history: History) -> None:
        """Copy what the folder lacks of the files beside the records, one by one, because they may be large."""
        if not history.beside:
            return
        beside = tuple(f"{folder}/" for folder in history.beside)
        here, there = self.local.sizes(prefix), self.remote.sizes(prefix)
        for key in there:
            if key.startswith(beside) and key not in here:
                self.local.put(key, self._remote_record(key, there[key]))

    def _records_ahead(self, prefix: str, history: History) -> dict[str, bytes]:
        """The records that must be copied from the remote to the folder before the run continues, in reverse: if this process
        dies between two of them, the first one still says that the remote is ahead."""
        here, there = self.local.sizes(prefix), self.remote.sizes(prefix)
        ahead = history.progress(there) > history.progress(here)
        wanted = [key for key in reversed(history.records) if key in there and (ahead or key not in here)]
        return {key: self._remote_record(key, there[key]) for key in wanted}

    def _remote_record(self, key: str, listed_bytes: int) -> bytes:
        data = self.remote.get(key)
        if len(data) < listed_bytes:  # records only grow
            raise StorageError(f"cannot read {key} in {self.remote}: it arrives shorter than it is; check the network")
        return data

    def _complete(self, prefix: str) -> bool:
        """Queue what the remote lacks of a folder. False if the remote has the longer history, which must stay."""
        self.remote.recover(prefix)
        here, there = self._sizes_here(prefix), self.remote.sizes(prefix)
        history = self._undecided.get(_below(prefix))
        if history is not None and history.progress(there) > history.progress(here):
            return False
        with self._changed:
            self._undecided.pop(_below(prefix), None)
            for name, size in here.items():
                if there.get(name) != size:
                    self._tasks.setdefault(name, _Task("put"))
        return True

    # The queue

    def _enqueue(self, key: str, task: _Task) -> None:
        with self._changed:
            # A new task for a key replaces the older one, and goes to the end.
            self._tasks.pop(key, None)
            self._tasks[key] = task
            self._start_worker()
            self._changed.notify_all()

    def _hold(self, key: str, data: bytes, error: StorageError) -> None:
        deadline = time.monotonic() + self._max_block_s
        with self._changed:
            self._tasks.pop(key, None)
            while self._held_bytes() + len(data) > self._max_held_bytes:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise StorageError(
                        f"{key} is stored nowhere: {error}; and {self.remote} does not take it: {self._last_error}"
                    ) from error
                self._changed.wait(remaining)
            self._enqueue(key, _Task("put", data))

    def _held_bytes(self) -> int:
        return sum(len(task.data) for task in self._tasks.values() if task.data is not None)

    def _start_worker(self) -> None:
        if self._worker is None or not self._worker.is_alive():
            # A daemon, so that an exit without flush does not hang. What is unsent is sent after the next start.
            self._worker = threading.Thread(target=self._work, name=f"upload to {self.remote}", daemon=True)
            self._worker.start()

    def _next(self) -> tuple[str, _Task] | None:
        """The oldest task that may be done now. Deletes come after all other tasks."""
        now, undecided = time.monotonic(), tuple(self._undecided)
        oldest_delete = None
        for key, task in self._tasks.items():
            if task.not_before > now or key.startswith(undecided):
                continue
            if task.verb != "delete":
                return key, task
            oldest_delete = oldest_delete or (key, task)
        return oldest_delete

    def _work(self) -> None:
        while True:
            with self._changed:
                while (chosen := self._next()) is None:
                    later = [task.not_before for task in self._tasks.values() if task.not_before]
                    self._changed.wait(max(min(later) - time.monotonic(), 0.0) if later else None)
            key, task = chosen
            try:
                done = self._do(key, task)
            except RunInUseError:
                self._abandon(key)
            # Any error: if this thread died, the mirror would stop without a word.
            except Exception as error:
                self._failed(key, task, error)
            else:
                self._succeeded(key, task) if done else self._postpone(key, task)

    def _do(self, key: str, task: _Task) -> bool:
        """Do the task; False if its time has not come."""
        if task.verb == "complete":
            return self._complete(key.removeprefix("/"))
        if task.verb == "delete":
            self.remote.delete(key)
            return True
        try:
            data = self.local.get(key) if task.data is None else task.data
        except MissingKeyError:
            return True  # deleted since
        # A file of lines only grows, so a longer one at the remote is newer.
        self.remote.put_longer(key, data) if key.endswith(".jsonl") else self.remote.put(key, data)
        return True

    def _succeeded(self, key: str, task: _Task) -> None:
        with self._changed:
            if self._tasks.get(key) is task:
                del self._tasks[key]
            if self._failures:
                _log.warning("uploads to %s work again", self.remote)
            self._failures = 0
            self._changed.notify_all()

    def _abandon(self, key: str) -> None:
        """Drop all tasks of a folder that another machine writes now. The next put or delete there raises an error."""
        folder = key.removeprefix("/") if key.startswith("/") else key.rpartition("/")[0]
        with self._changed:
            for name in [name for name in self._tasks if f"{name.removeprefix('/')}/".startswith(f"{folder}/")]:
                del self._tasks[name]
            self._changed.notify_all()

    def _postpone(self, key: str, task: _Task) -> None:
        message = (
            f"{self.remote} holds a longer history of {key.removeprefix('/')} than {self.local}, which is sent when it has "
            "become as long; to go on from the longer one instead, stop and start again"
        )
        with self._changed:
            if message != self._last_error:
                _log.warning("%s", message)
            self._failures, self._last_error = 0, message
            task.not_before = time.monotonic() + self._longest_pause_s
            self._changed.notify_all()

    def _failed(self, key: str, task: _Task, error: Exception) -> None:
        message = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}"
        with self._changed:
            if not self._failures:
                _log.warning("%s; the run goes on with %s and the upload is repeated", message, self.local)
            self._failures += 1
            self._last_error = message
            if self._tasks.get(key) is task and task.verb != "delete":
                # Try it last: one value that the service refuses must not stop the others.
                self._tasks.move_to_end(key)
            self._changed.notify_all()
            pause = min(self._first_pause_s * 2 ** min(self._failures - 1, 16), self._longest_pause_s)
            deadline = time.monotonic() + pause
            while not self._flushing and (remaining := deadline - time.monotonic()) > 0:
                self._changed.wait(remaining)
        if self._flushing:
            time.sleep(min(self._first_pause_s, 0.5))

    # Warnings

    def _say_local_failed(self, error: StorageError) -> None:
        if not self._local_failed:
            self._local_failed = True
            _log.warning("%s. What the folder does not take goes to %s alone", error, self.remote)

    def _report(self, unsent: Sequence[_Task]) -> None:
        lost = sum(task.data is not None for task in unsent)
        deletes = sum(task.verb == "delete" for task in unsent)
        fate = f"{lost} of them are in memory only and will be lost" if lost else f"all are in {self.local}"
        undeleted = f" and {deletes} not deleted there" if deletes else ""
        _log.warning(
            "%d values were not sent to %s%s (%s); %s. Start the run again, or use `icl runs --copy`, to send them",
            len(unsent) - deletes, self.remote, undeleted, self._last_error or "there was not enough time", fate,
        )  # fmt: skip


def _below(prefix: str) -> str:
    """The beginning of every key below the folder."""
    return f"{prefix}/" if prefix else ""
