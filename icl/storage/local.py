"""A folder as a store: every write is atomic and durable."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from icl.storage.keys import History, MissingKeyError, StorageError, check_key, check_prefix, is_key

_TEMPORARY_SUFFIX = ".tmp"


class LocalStore:
    """Values as files below `root`. Nothing is created before the first `put`.

    A value is written to a hidden temporary name in its final folder, flushed to the disk, renamed, and the folder
    flushed too: a reader, or the next start after a crash, sees the old value or the new one, never a part.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return f"folder {self.root}"

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            _make_folder(path.parent)
            write_atomically(path, data)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {explain(error)}") from error

    def get(self, key: str) -> bytes:
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingKeyError(f"there is no {key} in {self}") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {explain(error)}") from error

    def list(self, prefix: str = "") -> list[str]:
        return sorted(key for key, _ in self._files(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for key, entry in self._files(prefix):
            # A file may be deleted by its owner between the listing and the question for its size.
            with contextlib.suppress(FileNotFoundError):
                found[key] = entry.stat().st_size
        return dict(sorted(found.items()))

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            pass
        except OSError as error:
            raise StorageError(f"cannot delete {path}: {explain(error)}") from error

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def recover(self, prefix: str, history: History | None = None) -> None:
        """Delete the temporary files of writers that died. Their lock is held here, so none of them is alive."""
        for folder, _, names in os.walk(self._folder(prefix)):
            for name in names:
                if name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX):
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(folder, name))

    def send(self, key: str) -> None:
        check_key(key)

    def flush(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return ()

    def lock_path(self, prefix: str) -> Path:
        return self._folder(prefix) / ".lock"

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _folder(self, prefix: str) -> Path:
        return self.root / check_prefix(prefix)

    def _files(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        folders = [(self._folder(prefix), prefix)]
        while folders:
            folder, name = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        key = f"{name}/{entry.name}" if name else entry.name
                        if not is_key(key):
                            continue
                        if entry.is_dir():
                            folders.append((Path(entry.path), key))
                        elif entry.is_file():
                            yield key, entry
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise StorageError(f"cannot list {folder}: {explain(error)}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` under `path`, durably, so that a reader or a crash sees the old file or the new one; raises `OSError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_folder(path.parent)


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
