"""A folder whose contents also go to a remote store, in the background."""

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icl.storage.keys import InvalidKeyError, MissingKeyError, StorageError, Store
from icl.storage.local import LocalStore

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Task:
    """One thing to do at the remote. `data` is set only if the local folder could not take the value."""

    verb: Literal["put", "delete", "recover"]
    data: bytes | None = None


class MirroredStore:
    """Writes to `local`, then to `remote` in the background; reads `local` first.

    A `put` waits for the local disk only. The queue holds names, not values: what is sent is read back from the
    folder, so a remote that fails for days costs no memory. Only when the folder itself refuses a value is it held in
    memory, up to `max_held_bytes`; a `put` beyond that waits at most `max_block_s` seconds for room and then raises.

    Failed uploads are repeated, with growing pauses, until they succeed; an outage is logged once when it begins and
    once when it ends. Deletes reach the remote after all uploads, so that it never lacks an old state before it has
    the new one. What a killed process had not sent is sent after the next start, through `recover`.
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
        self._worker: threading.Thread | None = None
        self._failures = 0  # in a row
        self._last_error = ""
        self._flushing = 0
        self._local_failed = False
        self._listing_failed = False

    def __str__(self) -> str:
        return f"{self.local} and {self.remote}"

    def put(self, key: str, data: bytes) -> None:
        try:
            self.local.put(key, data)
        except InvalidKeyError:
            raise
        except StorageError as error:
            self._say_local_failed(error)
            self._hold(key, data, error)
        else:
            self._local_failed = False
            self._enqueue(key, _Task("put"))

    def get(self, key: str) -> bytes:
        try:
            return self.local.get(key)
        except InvalidKeyError:
            raise
        except StorageError as error:
            with self._changed:
                task = self._tasks.get(key)
            if task is not None and task.verb == "delete":
                raise MissingKeyError(f"there is no {key} in {self}") from error
            if task is not None and task.data is not None:
                return task.data
            return self.remote.get(key)

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes at both places. If the remote fails, those of the folder alone; raises if the folder has nothing."""
        here = self.local.sizes(prefix)
        try:
            there = self.remote.sizes(prefix)
            self._listing_failed = False
        except StorageError as error:
            # An empty folder beside an unreachable bucket is not an empty run: training would start anew over it.
            if not here:
                raise
            if not self._listing_failed:
                self._listing_failed = True
                _log.warning("%s; going on with what is in %s", error, self.local)
            there = {}
        with self._changed:
            deleted = {key for key, task in self._tasks.items() if task.verb == "delete"}
            held = {
                key: len(task.data)
                for key, task in self._tasks.items()
                if task.data is not None and (not prefix or key.startswith(f"{prefix}/"))
            }
        return {key: size for key, size in sorted((there | here | held).items()) if key not in deleted}

    def delete(self, key: str) -> None:
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
        return self.remote.exists(key)

    def recover(self, prefix: str) -> None:
        """Clear what a killed writer left in the folder, and send, in the background, what it had not sent."""
        self.local.recover(prefix)
        # Not a valid key, so it is no value's place in the queue.
        self._enqueue(f"/{prefix}", _Task("recover"))

    def fetch(self, key: str) -> None:
        if not self.local.exists(key):
            self.local.put(key, self.remote.get(key))

    def send(self, key: str) -> None:
        if self.local.exists(key):
            self._enqueue(key, _Task("put"))

    def flush(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """Wait until everything is sent, and return the keys that are not.

        Gives up after `timeout_s` seconds, or after three failures in a row without a success between them; the rest is
        then logged, with the reason. It stays in the folder and is sent when the run is started again.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._flushing += 1
            self._failures = min(self._failures, 1)
            given_up_at = self._failures + 3
            self._changed.notify_all()
            while self._tasks and self._failures < given_up_at:
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    break
                self._start_worker()
                self._changed.wait(remaining)
            self._flushing -= 1
            left = dict(self._tasks)
        unsent = [key for key, task in left.items() if task.verb != "recover"]
        for key in left.keys() - set(unsent):
            # Nobody could ask the remote what it has of this folder: nothing, then, for all we know.
            unsent += [name for name in self.local.list(key.removeprefix("/")) if name not in left]
        if unsent:
            self._report(len(unsent), sum(task.data is not None for task in left.values()))
        return tuple(unsent)

    def lock_path(self, prefix: str) -> Path:
        return self.local.lock_path(prefix)

    # The queue

    def _enqueue(self, key: str, task: _Task) -> None:
        with self._changed:
            # The newest wish for a key replaces the one before, and goes to the end.
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
            # A daemon: an exit without flush must not hang, and what is unsent is sent after the next start.
            self._worker = threading.Thread(target=self._work, name=f"upload to {self.remote}", daemon=True)
            self._worker.start()

    def _next(self) -> tuple[str, _Task] | None:
        """The oldest upload; a delete only if no upload waits."""
        for key, task in self._tasks.items():
            if task.verb != "delete":
                return key, task
        return next(iter(self._tasks.items()), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (chosen := self._next()) is None:
                    self._changed.wait()
            key, task = chosen
            try:
                self._do(key, task)
            # Anything at all: a thread that dies silently would be a mirror that silently stops.
            except Exception as error:
                self._failed(key, task, error)
            else:
                self._succeeded(key, task)

    def _do(self, key: str, task: _Task) -> None:
        if task.verb == "put":
            try:
                data = self.local.get(key) if task.data is None else task.data
            except MissingKeyError:
                return  # deleted since
            self.remote.put(key, data)
        elif task.verb == "delete":
            self.remote.delete(key)
        else:
            prefix = key.removeprefix("/")
            self.remote.recover(prefix)
            there = self.remote.sizes(prefix)
            missing = [name for name, size in self.local.sizes(prefix).items() if there.get(name) != size]
            with self._changed:
                for name in missing:
                    self._tasks.setdefault(name, _Task("put"))

    def _succeeded(self, key: str, task: _Task) -> None:
        with self._changed:
            if self._tasks.get(key) is task:
                del self._tasks[key]
            if self._failures:
                _log.warning("uploads to %s work again", self.remote)
            self._failures = 0
            self._changed.notify_all()

    def _failed(self, key: str, task: _Task, error: Exception) -> None:
        message = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}"
        with self._changed:
            if not self._failures:
                _log.warning("%s; the run goes on with %s and the upload is repeated", message, self.local)
            self._failures += 1
            self._last_error = message
            if self._tasks.get(key) is task and task.verb != "delete":
                # To the end: one value that the service refuses must not stop the others.
                self._tasks.move_to_end(key)
            self._changed.notify_all()
            pause = min(self._first_pause_s * 2 ** min(self._failures - 1, 16), self._longest_pause_s)
            deadline = time.monotonic() + pause
            while not self._flushing and (remaining := deadline - time.monotonic()) > 0:
                self._changed.wait(remaining)
        if self._flushing:
            time.sleep(min(self._first_pause_s, 0.5))

    # What people are told

    def _say_local_failed(self, error: StorageError) -> None:
        if not self._local_failed:
            self._local_failed = True
            _log.warning("%s. Until then checkpoints go to %s alone", error, self.remote)

    def _report(self, unsent: int, lost: int) -> None:
        fate = f"{lost} of them are in memory only and will be lost" if lost else f"all are in {self.local}"
        reason = self._last_error or "there was not enough time"
        _log.warning(
            "%d values were not sent to %s (%s); %s. Start the run again, or use `icl runs --copy`, to send them",
            unsent, self.remote, reason, fate,
        )  # fmt: skip
