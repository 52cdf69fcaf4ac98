"""What a store is: keys, errors and the protocol that every store follows."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

MAX_KEY_LENGTH = 900  # S3 allows 1024 bytes, the prefix of the bucket included
MAX_SEGMENT_LENGTH = 200  # file systems allow 255 bytes, and a temporary name is longer than the final one

# A segment never starts with a dot: hidden names are the stores' own (temporaries, locks), and ".." is no name at all.
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+@-]*\Z")


class StorageError(RuntimeError):
    """The store could not do what it was asked; the message says what happened and what to do."""


class MissingKeyError(StorageError):
    """Nothing is stored under this key."""


class InvalidKeyError(StorageError, ValueError):
    """This text cannot be a key: it is empty, absolute, climbs out of its folder or holds odd characters."""


def check_key(key: str) -> str:
    """Return `key` if it is a safe relative path of plain ASCII names, joined by single slashes.

    Raises:
        InvalidKeyError: for everything else, so that no key can leave the root of its store.
    """
    if not isinstance(key, str) or not key:
        raise InvalidKeyError(f"a storage key must be a non-empty text, not {key!r}")
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidKeyError(f"the storage key {key[:40]!r}... is longer than {MAX_KEY_LENGTH} characters")
    for segment in key.split("/"):
        if not _SEGMENT.match(segment) or len(segment) > MAX_SEGMENT_LENGTH:
            shown = key if len(key) <= 80 else key[:80] + "..."
            raise InvalidKeyError(
                f"the storage key {shown!r} is refused: each part between slashes must start with a letter, digit or "
                f"underscore, hold only those and . , = + @ -, and have at most {MAX_SEGMENT_LENGTH} characters"
            )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it names a folder: the empty text for everything, else a key."""
    return prefix if prefix == "" else check_key(prefix)


def is_key(text: str) -> bool:
    """Whether `text` could have been stored here; listings leave out what other programs put beside our files."""
    try:
        check_key(text)
    except InvalidKeyError:
        return False
    return True


class History(NamedTuple):
    """How two copies of one folder are compared, so that the shorter history never replaces the longer.

    Attributes:
        progress: sizes of a copy's files by key -> how far that copy is, as a tuple that grows with it.
        records: keys of the files that grow with the history under one name.
    """

    progress: Callable[[Mapping[str, int]], tuple[int, ...]]
    records: Sequence[str]


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
        """Remove `key`; removing what is not there is no error."""
        ...

    def exists(self, key: str) -> bool:
        """Whether something is stored under `key`."""
        ...

    def recover(self, prefix: str, history: History | None = None) -> None:
        """Put right what a killed writer left below `prefix`, and settle which copy of it is continued if there are two.

        Only the holder of that folder's lock may call this.
        """
        ...

    def send(self, key: str) -> None:
        """Send what another writer has put under `key`, a file or a folder, if there is more than this machine's copy."""
        ...

    def flush(self, timeout_s: float | None = None) -> Sequence[str]:
        """Wait for background work, at most `timeout_s` seconds; return the keys that are not yet everywhere."""
        ...

    def lock_path(self, prefix: str) -> Path:
        """The file on this machine whose lock guards the folder `prefix`."""
        ...
