"""Bytes in, bytes out: a local folder, an S3 bucket, or both.

`store_from_environment` chooses by `LOCAL_ROOT` and `AWS_BUCKET_NAME`; boto3 is imported at the first request to S3.
"""

import re
from collections.abc import Mapping

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
    "open_store",
    "store_from_environment",
]

DEFAULT_ROOT = "./checkpoints"


def store_from_environment(env: Mapping[str, str]) -> Store:
    """Return the store that `env` asks for: the folder `LOCAL_ROOT`, mirrored to `AWS_BUCKET_NAME` if that is set."""
    local = LocalStore(env.get("LOCAL_ROOT") or DEFAULT_ROOT)
    bucket = env.get("AWS_BUCKET_NAME")
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
        return LocalStore(location)
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise InvalidKeyError(f"{location!r} is no storage location; write s3://bucket/prefix or the path of a folder")
    return S3Store(bucket, prefix)
