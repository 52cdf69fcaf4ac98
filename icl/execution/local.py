"""One run as a process on this machine."""

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

from icl.execution.output import opened_log
from icl.execution.schedule import Ended

DRAIN_S = 5.0  # how long to read on after a process has ended, because its own children may hold its output open


_PROGRESS = re.compile(r": (\d+/\S+(?:, \d+ s left)?.*)")


class LocalProcess:
    """One run as a process in its own group. So Ctrl-C does not reach it directly; the schedule passes it on, once."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        """Start the command. All it prints is appended to `log`, if that can be written.

        Raises:
            OSError: the command cannot be started.
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
        self._reader = threading.Thread(target=self._read, args=(opened_log(log),), daemon=True)
        self._reader.start()

    def _read(self, log: int) -> None:
        assert self._process.stdout is not None
        with os.fdopen(log, "ab", buffering=0) as file, self._process.stdout as output:
            for line in output:
                with suppress(OSError):  # go on reading if the disk is full, or the process would block
                    file.write(line)
                if text := line.decode(errors="replace").strip():
                    self._lines.append(text)

    def poll(self) -> Ended | None:
        """How the process ended, or None while it runs. The reason is its last line."""
        status = self._process.poll()
        if status is None:
            return None
        self._ended_at = self._ended_at or time.monotonic()
        if self._reader.is_alive() and time.monotonic() - self._ended_at < DRAIN_S:
            return None
        if status == 0:
            return Ended(True)
        messages = [line.removeprefix("icl: ") for line in self._lines if line.startswith("icl: ")]
        if status < 0 and not messages:
            return Ended(False, f"ended by {signal.Signals(-status).name}")
        return Ended(False, [f"exit status {status}", *self._lines, *messages][-1])

    def note(self) -> str:
        """Steps done and time left, from the last progress line of the process."""
        found = (_PROGRESS.search(line) for line in reversed(tuple(self._lines)))  # copied: the reader may add lines
        return next((match[1] for match in found if match), "")

    def stop(self) -> None:
        """Send SIGINT."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
