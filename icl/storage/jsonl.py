"""Files of one JSON object per line that grow at their end, and files of one JSON object.

One rule for what a crash or a bad disk spoils: every line stands alone. A last line that does not end is cut away. A
line before it that is no JSON object is passed over with a warning, and set aside before the file is written again;
those before and after it count.
"""

import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from icl.storage.files import read_file, write_atomically

Row = dict[str, Any]
Sound = Callable[[Row], bool]
"""Whether an object is a row of its file."""

_log = logging.getLogger(__name__)


def has_step(row: Row) -> bool:
    """Whether a row belongs to a training step, as those of metrics and traces do."""
    return type(row.get("step")) is int and row["step"] >= 0


def parse_object(data: bytes | str) -> Row | None:
    """The JSON object in `data`, or None if it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_lines(data: bytes, source: str, sound: Sound = lambda row: True) -> list[Row]:
    """The objects of a file's content, in order; `source` is its name in the warning about lines that are none."""
    return [row for _, row in _split(data, source, sound)[0]]


def read_json_lines(path: Path, sound: Sound = lambda row: True) -> list[Row]:
    """The objects of a file, in order; none where there is no file.

    Raises:
        OSError: it cannot be read.
    """
    return parse_lines(_content(path), str(path), sound)


class JsonLines:
    """A file that one writer at a time adds to; a lock that its caller holds sees to that.

    Equal rows give equal bytes: numbers are written in full, so that a row that was read is written as it was.

    Attributes:
        count: rows of the file, those that wait for the disk included.
    """

    def __init__(
        self,
        path: Path,
        rows: Iterable[Mapping[str, Any]] | None = None,
        sound: Sound = lambda row: True,
        keep: Callable[[Row], bool] = lambda row: True,
    ) -> None:
        """Open the file, or begin it. Lines that hold no row are set aside, at the end of `<name>.damaged`.

        Args:
            rows: what it is to hold from now on. None: what it holds already, but for a last line that a crash cut
                short. If this is not what is there, it is put there in one atomic replacement.
            sound: which objects are rows.
            keep: which of the rows that it holds already are to stay; the others are dropped.

        Raises:
            OSError: the disk or the folder refuses.
        """
        self.path = path
        present = _content(path)
        good, bad = _split(present, str(path), sound)
        if bad:
            aside = path.with_name(f"{path.name}.damaged")
            write_atomically(aside, _content(aside) + b"".join(line + b"\n" for line in bad))
        lines = [line + b"\n" for line, row in good if keep(row)] if rows is None else list(map(_line, rows))
        self.count, kept = len(lines), b"".join(lines)
        if kept != present or not _is_own(path):
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
        self.count += 1
        self.flush()

    def flush(self) -> None:
        """Write the rows that wait; raises like `append`."""
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        with os.fdopen(os.open(self.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)), "r+b") as file:
            file.truncate(self._size)  # of a row that an earlier attempt wrote in part
            file.seek(self._size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
        self._waiting.clear()


def _is_own(path: Path) -> bool:
    """Whether there is a file that has this name alone: to write to a link, hard or symbolic, would change another."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _content(path: Path) -> bytes:
    return read_file(path) if path.exists() else b""


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _split(data: bytes, source: str, sound: Sound) -> tuple[list[tuple[bytes, Row]], list[bytes]]:
    """The whole lines that hold a row, with it, and those that hold something else; empty ones are neither."""
    good: list[tuple[bytes, Row]] = []
    bad: dict[int, bytes] = {}
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        row = parse_object(line)
        if row is not None and sound(row):
            good.append((line, row))
        elif line.strip():
            bad[number] = line
    if bad:
        _warn(source, min(bad), len(bad))
    return good, list(bad.values())


@cache  # a record is read several times on the way to one start
def _warn(source: str, first: int, count: int) -> None:
    more = f" and {count - 1} more" if count > 1 else ""
    _log.warning("%s: line %d%s is damaged and left out; all others count", source, first, more)
