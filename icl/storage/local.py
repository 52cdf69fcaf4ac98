"""A folder as a store: every write is atomic and durable."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from icl.storage.claims import NoClaim
from icl.storage.files import TEMPORARY_SUFFIX, explain, read_file, write_atomically
from icl.storage.keys import MissingKeyError, StorageError, check_key, check_prefix, is_key
from icl.storage.store import History

_log = logging.getLogger(__name__)


class LocalStore:
    """Values as files below `root`, written by `icl.storage.files`. Nothing is created before the first `put`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return f"folder {self.root}"

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {explain(error)}") from error

    def get(self, key: str) -> bytes:
        path = self._path(key)
        try:
            return read_file(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingKeyError(f"there is no {key} in {self}") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {explain(error)}") from error

    def list(self, prefix: str = "") -> list[str]:
        return sorted(key for key, _ in self._files(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for key, entry in self._files(prefix):
            # The owner of a file may delete it between the listing and this call.
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
                if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(folder, name))

    def send(self, key: str) -> None:
        check_key(key)

    def put_longer(self, key: str, data: bytes) -> None:
        path = self._path(key)
        if not path.is_file() or path.stat().st_size <= len(data):
            self.put(key, data)

    def flush(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return ()

    def lock_path(self, prefix: str) -> Path:
        return self._folder(prefix) / ".lock"

    def claim(self, prefix: str) -> NoClaim:
        """No claim is needed: every process that shares the folder shares its locks."""
        return NoClaim()

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _folder(self, prefix: str) -> Path:
        return self.root / check_prefix(prefix)

    def _files(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Keys and files below a folder. A subfolder that cannot be listed is skipped, so that it does not hide the rest."""
        folders = [(self._folder(prefix), prefix)]
        while folders:
            folder, name = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        key = f"{name}/{entry.name}" if name else entry.name
                        kind = self._kind(entry, key) if is_key(key) else None
                        if kind == "folder":
                            folders.append((Path(entry.path), key))
                        elif kind == "file":
                            yield key, entry
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if name == prefix:
                    raise StorageError(f"cannot list {folder}: {explain(error)}") from error
                _log.warning("%s is passed over: %s", folder, explain(error))

    def _kind(self, entry: os.DirEntry[str], key: str) -> Literal["folder", "file"] | None:
        """What an entry is for a listing; None if the listing leaves it out.

        Symbolic links to folders are followed at the first two levels of the store only, and not if they lead to the
        store itself or above it. So folders may lie on other disks, and a listing never runs in a circle.
        """
        try:
            if not entry.is_dir():
                return "file" if entry.is_file() else None
            if not entry.is_symlink():
                return "folder"
            upward = self.root.resolve().is_relative_to(Path(entry.path).resolve())
            return "folder" if key.count("/") < 2 and not upward else None
        except (OSError, RuntimeError):  # a link that leads to itself
            return None
