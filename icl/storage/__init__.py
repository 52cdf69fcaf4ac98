"""Bytes in, bytes out: a local folder, an S3 bucket, or both.

`store_from_environment` chooses by `LOCAL_ROOT` and `AWS_BUCKET_NAME`. boto3 is imported at the first request to S3.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from icl.storage.keys import InvalidKeyError, MissingKeyError, StorageError, check_key
from icl.storage.local import LocalStore
from icl.storage.mirrored import MirroredStore
from icl.storage.s3 import S3Store
from icl.storage.store import History, Store

__all__ = [
    "History",
    "InvalidKeyError",
    "LocalStore",
    "MirroredStore",
    "MissingKeyError",
    "S3Store",
    "StorageError",
    "Store",
    "check_key",
    "local_root",
    "open_store",
    "store_from_environment",
]

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:.+")  # as boto3 takes them: a name, or an access point
DEFAULT_ROOT = "./checkpoints"


def local_root(env: Mapping[str, str]) -> Path:
    """The folder on this machine that holds everything: LOCAL_ROOT (~ is the home folder), or else `DEFAULT_ROOT`.

    Raises:
        InvalidKeyError: there is no home folder.
    """
    text = env.get("LOCAL_ROOT") or DEFAULT_ROOT
    return _folder(text, f"LOCAL_ROOT={text}")


def _folder(text: str, source: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InvalidKeyError(f"{source}: there is no such home folder; write the path in full") from None


def store_from_environment(env: Mapping[str, str]) -> Store:
    """Return the store that `env` asks for: the folder `LOCAL_ROOT`, mirrored to `AWS_BUCKET_NAME` if that is set.

    Raises:
        InvalidKeyError: `LOCAL_ROOT` is not the name of a folder, or `AWS_BUCKET_NAME` not that of a bucket.
    """
    local = LocalStore(local_root(env))
    bucket = env.get("AWS_BUCKET_NAME")
    if bucket and not _BUCKET.fullmatch(bucket):
        raise InvalidKeyError(
            f"AWS_BUCKET_NAME={bucket!r} is not the name of a bucket; write the name alone, as in my-bucket"
        )
    return MirroredStore(local, S3Store(bucket)) if bucket else local


def open_store(location: str) -> LocalStore | S3Store:
    """Return the store at `location`: `s3://bucket/prefix` or the path of a folder.

    Raises:
        InvalidKeyError: `location` is empty, or names no bucket or an unsafe prefix.
    """
    location = re.sub(r"//[^/]*@", "//", location)  # a password has no place here, nor in a message
    scheme, separator, rest = location.partition("://")
    if not separator:
        if not location:
            raise InvalidKeyError("a storage location must be a folder or s3://bucket/prefix, not the empty text")
        return LocalStore(_folder(location, location))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise InvalidKeyError(
            f"{location!r} is not a storage location; write s3://bucket/prefix or the path of a folder"
        )
    return S3Store(bucket, prefix)
