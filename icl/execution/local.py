"""One run as a process on this machine."""

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from icl.execution.schedule import Ended
from icl.storage.files import explain

DRAIN_S = 5.0  # for the last words of a process; one that it started itself may hold its output open for longer


_log = logging.getLogger(__name__)
_PROGRESS = re.compile(r": (\d+/\S+(?:, \d+ s left)?.*)")


def _opened(log: Path) -> int:
    """A descriptor that appends to the log; where it cannot be, one that drops what it gets, and a warning."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        # Without waiting: somebody may have put a pipe there that nobody reads, or a link to another file.
        guards = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | guards, 0o666)
    except OSError as error:
        _log.warning("what the run prints is not kept: cannot write %s: %s", log, explain(error))
        return os.open(os.devnull, os.O_WRONLY)


class LocalProcess:
    """One run as a process in a group of its own, so that Ctrl-C reaches it from the schedule alone, and once."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        """Start the command; all it prints is appended to `log`, where that can be written.

        Raises:
            OSError: it cannot be started.
        """
        self._lines: deque[str] = deque(maxlen=50)
        self._ended_at: float | None = None
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(_opened(log),), daemon=True)
        self._reader.start()

    def _read(self, log: int) -> None:
        assert self._process.stdout is not None
        with os.fdopen(log, "ab", buffering=0) as file, self._process.stdout as output:
            for line in output:
                with suppress(OSError):  # a full disk must not stop the reading, for then the process would block
                    file.write(line)
                if text := line.decode(errors="replace").strip():
                    self._lines.append(text)

    def poll(self) -> Ended | None:
        """How the process ended, or None; the reason is its last line."""
        status = self._process.poll()
        if status is None:
            return None
        self._ended_at = self._ended_at or time.monotonic()
        if self._reader.is_alive() and time.monotonic() - self._ended_at < DRAIN_S:
            return None
        if status == 0:
            return Ended(True)
        told = [line.removeprefix("icl: ") for line in self._lines if line.startswith("icl: ")]
        if status < 0 and not told:
            return Ended(False, f"ended by {signal.Signals(-status).name}")
        return Ended(False, [f"exit status {status}", *self._lines, *told][-1])

    def note(self) -> str:
        """Steps done and time left, as the process last said."""
        found = (_PROGRESS.search(line) for line in reversed(tuple(self._lines)))  # the reader may add to it meanwhile
        return next((match[1] for match in found if match), "")

    def stop(self) -> None:
        """SIGINT."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
