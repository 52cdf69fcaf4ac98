"""Files of one JSON object per line that grow at their end.

One rule for what a crash or a bad disk spoils: every line stands alone. A line that does not end, or is no JSON object,
is passed over; those before and after it count.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from icl.storage.files import write_atomically


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, in order; none where there is no file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for line in lines if (row := _parsed(line)) is not None]


class JsonLines:
    """A file that one writer at a time adds to; a lock that its caller holds sees to that.

    Equal rows give equal bytes: numbers are written in full, so that a row that was read is written as it was.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Open the file, or begin it.

        Args:
            rows: what it is to hold from now on. None: what it holds already, but for a last line that a crash cut
                short. If this is not what is there, it is put there in one atomic replacement.

        Raises:
            OSError: the disk or the folder refuses.
        """
        self.path = path
        present = path.read_bytes() if path.exists() else b""
        kept = present[: present.rfind(b"\n") + 1] if rows is None else b"".join(map(_line, rows))
        if kept != present or not path.exists():
            write_atomically(path, kept)
        self._size = len(kept)
        self._waiting: list[bytes] = []

    @property
    def waiting(self) -> int:
        """Rows that the disk has refused so far."""
        return len(self._waiting)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and see it onto the disk; one that the disk refuses waits in memory and goes with the next.

        Raises:
            OSError: the disk refuses.
        """
        self._waiting.append(_line(row))
        self.flush()

    def flush(self) -> None:
        """Write the rows that wait; raises like `append`."""
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        with self.path.open("r+b") as file:
            file.truncate(self._size)  # of a row that an earlier attempt wrote in part
            file.seek(self._size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
        self._waiting.clear()


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
