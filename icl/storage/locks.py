"""One writer per run: a file lock that the operating system frees when its holder dies."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from icl.storage.files import explain
from icl.storage.keys import StorageError


class RunInUseError(StorageError):
    """Another process holds the run; the message names it."""


class Holder(NamedTuple):
    """Who holds a lock: a process number on a host, and since when (UTC, for people to read, never compared)."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def exclusive(path: Path, subject: str, wait_s: float = 1.0) -> Iterator[None]:
    """Hold the lock file `path` for the length of a `with` block.

    The lock itself is the kernel's, so a dead holder frees it and there is nothing stale to judge. A file beside it
    says who the holder is; it informs people and decides nothing. Waiting `wait_s` seconds lets a short look at the
    lock (`holder_of`) pass unnoticed.

    Raises:
        RunInUseError: another process still has the lock after `wait_s` seconds.
        StorageError: the lock file cannot be created.
    """
    lock = FileLock(path, timeout=wait_s)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = _read_holder(path) or "another process"
        raise RunInUseError(
            f"{subject} is in use by {holder}; wait for it, stop it, or choose another run name"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot lock {path}: {explain(error)}") from error
    try:
        _write_holder(path)
        yield
    finally:
        # A missing or unwritable note must never keep a run from starting or ending.
        with contextlib.suppress(OSError):
            _note(path).unlink()
        lock.release()


def holder_of(path: Path) -> Holder | None:
    """Return who holds the lock file `path`, or None if nobody does."""
    if not path.exists():
        return None
    lock = FileLock(path, timeout=0)
    try:
        with lock:
            return None
    except Timeout:
        return _read_holder(path) or Holder("unknown host", 0, "unknown time")
    except OSError:
        return None


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}-holder.json")


def _write_holder(path: Path) -> None:
    holder = Holder(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
    with contextlib.suppress(OSError):
        _note(path).write_text(json.dumps(holder._asdict()))


def _read_holder(path: Path) -> Holder | None:
    try:
        fields = json.loads(_note(path).read_text())
        return Holder(str(fields["host"]), int(fields["pid"]), str(fields["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
