"""What every store promises."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from icl.storage.claims import Claim, NoClaim


class History(NamedTuple):
    """How two copies of one folder are compared, so that the shorter history never replaces the longer one.

    Attributes:
        progress: maps the sizes of a copy's files, by key, to how far that copy is: a tuple that grows with it.
        records: keys of the files that keep their name and grow, such as the metrics.
        beside: folders whose files are written once, such as tables. A copy that lacks some of them gets these.
    """

    progress: Callable[[Mapping[str, int]], tuple[int, ...]]
    records: Sequence[str]
    beside: Sequence[str] = ()


class Store(Protocol):
    """Bytes under keys. A key is a relative path such as `icl/run/100.safetensors`; a prefix is a folder of keys.

    A value is visible whole or not at all, and a later `put` replaces it. Every method raises `InvalidKeyError` for an
    unsafe key and `StorageError` for what went wrong outside.
    """

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`; when this returns, the value survives the death of this process."""
        ...

    def get(self, key: str) -> bytes:
        """Return what is stored under `key`; raises `MissingKeyError` if nothing is."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Return all keys below the folder `prefix`, sorted."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes of every key below the folder `prefix`."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`. If there is no such key, nothing happens."""
        ...

    def exists(self, key: str) -> bool:
        """Whether something is stored under `key`."""
        ...

    def recover(self, prefix: str, history: History | None = None) -> None:
        """Clean up what a killed writer left below `prefix`. If there are two copies, decide which one is continued.

        Only the holder of that folder's lock may call this.
        """
        ...

    def send(self, key: str) -> None:
        """Send the file or folder `key`, which another writer of this machine wrote, to the remote copy if there is one."""
        ...

    def put_longer(self, key: str, data: bytes) -> None:
        """`put` a file that only grows, unless a longer one is there."""
        ...

    def flush(self, timeout_s: float | None = None) -> Sequence[str]:
        """Wait for background work, at most `timeout_s` seconds; return the keys that are not yet everywhere."""
        ...

    def lock_path(self, prefix: str) -> Path:
        """The file on this machine whose lock guards the folder `prefix`."""
        ...

    def claim(self, prefix: str) -> Claim | NoClaim:
        """The claim that excludes writers on other machines from the folder `prefix`; the same object at every call."""
        ...
