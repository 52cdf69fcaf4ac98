"""Safe writing and reading of files.

Every file of the library is written by `replacing`, or grows by `icl.storage.jsonl.JsonLines`, so none is ever half
written. `read_file` checks what kind of file it has before it reads, because another program may have put it there.
"""

import contextlib
import errno
import gzip
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pandas as pd

TEMPORARY_SUFFIX = ".tmp"

LARGEST = 2 * 2**30
"""Bytes of the largest file that is read; a run's are thousands of times smaller."""


class UnfitFileError(OSError):
    """What has this name cannot be read as a whole file; the message says why and what to do."""


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most LARGEST bytes.

    Raises:
        UnfitFileError: it is a pipe, a socket or a device, or it is larger than LARGEST.
        OSError: there is no such file, or it cannot be read.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise UnfitFileError("it is a pipe, a socket or a device, not a file; move it away")
    if status.st_size > LARGEST:
        raise UnfitFileError(f"its {status.st_size:,} bytes are more than a file of a run has; move it away")
    # Non-blocking: if the file was replaced by a pipe since, reading must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        with os.fdopen(descriptor, "rb") as file:
            return file.read()
    except MemoryError:
        raise UnfitFileError(f"its {status.st_size:,} bytes do not fit into the memory; move it away") from None


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new binary file that takes the name `path` when the `with` block ends, and is deleted when the block fails.

    The file is written under a hidden name in the same folder, flushed to the disk and renamed. Then the folder is
    flushed. So a reader, or the next start after a crash, sees the old file or the new one, never a part of one.
    Missing folders are made.

    Args:
        path: the name of the finished file.
        mode: the file's permissions, less what the umask forbids.

    Raises:
        OSError: the disk or the folder refuses.
    """
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
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
        digits: significant digits of a float. float32 carries seven. None: as many as are needed to read the same
            float back.
        missing: the text for a missing value.
    """
    write_atomically(path, table_bytes(table, path, digits, missing))


def table_bytes(table: "pd.DataFrame", path: Path, digits: int | None = 7, missing: str = "") -> bytes:
    """The bytes that `write_table` writes."""
    form = None if digits is None else f"%.{digits}g"
    content = table.to_csv(index=False, float_format=form, na_rep=missing).encode()
    # No time in the gzip header, because it would differ at every writing.
    return gzip.compress(content, mtime=0) if path.suffix == ".gz" else content


def explain(error: OSError) -> str:
    """What the operating system's refusal means and what to do about it."""
    if isinstance(error, UnfitFileError):
        return str(error)
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
    """Create `folder` and its parents. Each parent is flushed, so that a power cut cannot lose the new folder's name."""
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
