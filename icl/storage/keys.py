"""Keys, and what goes wrong with them and their values."""

import re

MAX_KEY_LENGTH = 900  # S3 allows 1024 bytes, the prefix of the bucket included
MAX_SEGMENT_LENGTH = 200  # file systems allow 255 bytes, and a temporary name is longer than the final one

# A segment never starts with a dot: hidden names are the stores' own (temporaries, locks), and ".." is not a name.
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
        InvalidKeyError: `key` is anything else. So no key can leave the root of its store.
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
    """Return `prefix` if it names a folder: a key, or the empty text for the whole store."""
    return prefix if prefix == "" else check_key(prefix)


def is_key(text: str) -> bool:
    """Whether `text` is a valid key. Listings leave out all other names, which other programs may have put there."""
    try:
        check_key(text)
    except InvalidKeyError:
        return False
    return True
