"""One writer per run: a file lock that the operating system frees when its holder dies."""

import contextlib
import errno
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from icl.storage.files import explain, write_atomically
from icl.storage.keys import StorageError

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_NOTE_BYTES = 4096

_log = logging.getLogger(__name__)


class RunInUseError(StorageError):
    """Another process holds the run; the message names it."""


class Holder(NamedTuple):
    """Who holds a lock: a process number on a host, and since when (UTC, for people to read, never compared)."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Held:
    """A lock that this process holds, unless somebody takes its file away."""

    def __init__(self, path: Path, subject: str, descriptor: int | None) -> None:
        """`descriptor` is that of the open lock file, or None if the file system has no locks."""
        self._path, self._subject, self._descriptor = path, subject, descriptor

    def check(self) -> None:
        """Raise `RunInUseError` if the lock file was removed or replaced. Another process may have locked a new one."""
        if self._descriptor is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), self._path.lstat()):
                return
        raise RunInUseError(
            f"the lock {self._path} was removed while this process wrote {self._subject}, so another process may write "
            "it too; start it again (it goes on from its last state), and leave the lock file alone"
        )


@contextlib.contextmanager
def exclusive(path: Path, subject: str, wait_s: float = 1.0) -> Iterator[Held]:
    """Hold the lock file `path` for the length of a `with` block.

    The lock is the kernel's. It is freed when its holder dies, so a lock is never stale. A file beside it names the
    holder, only to inform people. `holder_of` takes the lock for a moment; waiting `wait_s` seconds gets over that. On
    a file system without locks the block runs without one, and a warning says so.

    Raises:
        RunInUseError: another process still has the lock after `wait_s` seconds.
        StorageError: the lock file cannot be created.
    """
    lock = FileLock(path, timeout=wait_s, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = _read_holder(path) or "another process"
        raise RunInUseError(
            f"{subject} is in use by {holder}; wait for it, stop it, or choose another run name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise StorageError(f"cannot lock {path}: {explain(error)}") from error
        _log.warning(
            "the file system of %s has no locks (%s): nothing keeps a second process from writing %s; start it once only",
            path.parent, error.strerror, subject,
        )  # fmt: skip
    # FileLock does not show its own descriptor, so the file is opened again. While open, its inode number is not reused.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)) if lock.is_locked else None
    try:
        _write_holder(path)
        yield Held(path, subject, descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        # A missing or unwritable note must not keep a run from starting or ending.
        with contextlib.suppress(OSError):
            _note(path).unlink()
        lock.release()


def holder_of(path: Path) -> Holder | None:
    """Return who holds the lock file `path`, or None if nobody does."""
    if not path.exists():
        return None
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
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
        # A new file replaces what has this name. A link of another user's is not followed.
        write_atomically(_note(path), json.dumps(holder._asdict()).encode())


def _read_holder(path: Path) -> Holder | None:
    try:
        # A link of another user's is not followed, and a pipe does not block.
        descriptor = os.open(_note(path), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            fields = json.loads(file.read(_NOTE_BYTES))
        return Holder(str(fields["host"]), int(fields["pid"]), str(fields["since"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
