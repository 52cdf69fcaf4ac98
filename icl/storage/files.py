"""Files that are never half written: every file of the library goes through `replacing`, or grows by `JsonLines`."""

import contextlib
import errno
import gzip
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pandas as pd

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes the name `path` when the `with` block ends, and is deleted when the block fails.

    It is written under a hidden name of its own in the same folder, flushed to the disk and renamed; then the folder is
    flushed. A reader, or the next start after a crash, sees the old file or the new one, never a part. Missing folders
    are made.

    Raises:
        OSError: the disk or the folder refuses.
    """
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` under `path`, as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


def write_table(table: "pd.DataFrame", path: Path, digits: int | None = 7, missing: str = "") -> None:
    """Write a CSV file as `replacing` does; equal tables give equal bytes, compressed (a name in `.gz`) or not.

    Args:
        digits: significant digits of a float. Seven are what float32 carries; None: as many as tell it from every other.
        missing: what stands for a missing value.
    """
    form = None if digits is None else f"%.{digits}g"
    content = table.to_csv(index=False, float_format=form, na_rep=missing).encode()
    if path.suffix == ".gz":
        # Without a name and a time in its head, which would differ at every writing.
        content = gzip.compress(content, mtime=0)
    write_atomically(path, content)


def explain(error: OSError) -> str:
    """What the operating system's refusal means and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or set LOCAL_ROOT to a folder on a larger disk"
    if error.errno == errno.EROFS:
        return "the file system is read-only; set LOCAL_ROOT to a folder you may write to"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied; check the folder's owner and mode or set LOCAL_ROOT to a folder you may write to"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "a file stands where a folder is needed, or the reverse; move it away or set LOCAL_ROOT elsewhere"
    return f"{error.strerror or error}; set LOCAL_ROOT to another folder if this one cannot be repaired"


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents; a new folder's own name is flushed too, or a power cut could take it away."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # only POSIX systems let a folder be opened and flushed
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
