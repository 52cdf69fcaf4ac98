"""Files of one JSON object per line that grow at their end, and files of one JSON object.

A crash or a bad disk may damage lines. A last line without its line end is cut away. Any other line that is not a JSON
object is skipped with a warning, and moved to `<name>.damaged` before the file is written again. All other lines
count.
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
    """The JSON object in `data`, or None if `data` is not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_lines(data: bytes, source: str, sound: Sound = lambda row: True) -> list[Row]:
    """The objects of a file's content, in order. `source` names the file in the warning about damaged lines."""
    return [row for _, row in _split(data, source, sound)[0]]


def read_json_lines(path: Path, sound: Sound = lambda row: True) -> list[Row]:
    """The objects of a file, in order; an empty list if there is no file.

    Raises:
        OSError: the file cannot be read.
    """
    return parse_lines(_content(path), str(path), sound)


class JsonLines:
    """A file of rows to which one writer at a time appends. The caller must hold a lock.

    Numbers are written in full, so a row that is read and written again keeps its bytes.

    Attributes:
        count: rows of the file, including those that wait for the disk.
    """

    def __init__(
        self,
        path: Path,
        rows: Iterable[Mapping[str, Any]] | None = None,
        sound: Sound = lambda row: True,
        keep: Callable[[Row], bool] = lambda row: True,
    ) -> None:
        """Open the file, or make it. Damaged lines are moved to the end of `<name>.damaged`.

        Args:
            rows: the rows that the file shall hold. None: those that it holds already. If the file differs from this,
                it is replaced atomically.
            sound: which objects are rows.
            keep: which of the file's present rows stay, if `rows` is None; the others are dropped.

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
        """Add a row and flush it to the disk. A row that the disk refuses waits in memory and is written with the next.

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
            file.truncate(self._size)  # cut away what an earlier attempt wrote in part
            file.seek(self._size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
        self._waiting.clear()


def _is_own(path: Path) -> bool:
    """Whether `path` is a regular file with no other name. Writing to a link, hard or symbolic, would change another."""
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
    """The complete lines that hold a row, each with its row, and the damaged ones. Empty lines are in neither list."""
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


@cache  # one warning per file, although a start reads it several times
def _warn(source: str, first: int, count: int) -> None:
    more = f" and {count - 1} more" if count > 1 else ""
    _log.warning("%s: line %d%s is damaged and left out; all others count", source, first, more)
