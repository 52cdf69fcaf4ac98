"""An S3 bucket as a store, or any service that speaks S3 (`AWS_ENDPOINT_URL`).

Credentials, region and endpoint come from boto3's own chain and appear in no message. boto3 is imported at the first
request, so that importing this module costs nothing.
"""

import contextlib
import hashlib
import io
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from icl.storage.keys import History, MissingKeyError, StorageError, check_key, check_prefix, is_key

_MISSING = {"NoSuchKey", "404", "NotFound"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "403", "Forbidden"}
_DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"}
_BUSY = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "500", "502", "503", "504"}


class S3Store:
    """Values as objects of `bucket`, below `prefix`.

    Objects are visible whole or not at all, multipart uploads included. Every upload carries a checksum that the
    service verifies, and every download is verified against it. Requests are retried in botocore's standard mode; one
    request takes at most `attempts` (connect + read timeout) and some seconds of backoff: two minutes by default.

    Args:
        bucket: its name.
        prefix: folder in the bucket that all keys are below; empty for the whole bucket.
        connect_timeout_s, read_timeout_s: of one attempt, in seconds.
        attempts: how often one request is tried.
        multipart_bytes: larger values are sent in parts of 8 MiB.
        listing_lifetime_s: how long a listing is remembered. This store's own writes and deletes are seen at once,
            those of others after this time. 1000 keys cost one request.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 20.0,
        attempts: int = 4,
        multipart_bytes: int = 16 * 2**20,
        listing_lifetime_s: float = 60.0,
    ) -> None:
        self.bucket = bucket
        self.prefix = check_prefix(prefix.strip("/"))
        self._timeouts = (connect_timeout_s, read_timeout_s)
        self._attempts = attempts
        self._multipart_bytes = multipart_bytes
        self._listing_lifetime_s = listing_lifetime_s
        self._lock = threading.Lock()
        self._cached_client: Any = None
        self._listings: dict[str, tuple[float, dict[str, int]]] = {}
        self._changes = 0

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        name = self._name(key)
        send = self._put_whole if len(data) <= self._multipart_bytes else self._put_in_parts
        for attempt in range(self._attempts):
            try:
                send(name, data)
                break
            except _boto_errors() as error:
                # botocore repeats requests, but not one whose body arrived damaged.
                if _code(error) not in _DAMAGED or attempt + 1 == self._attempts:
                    raise self._failure("write", key, error) from error
                time.sleep(_pause_s(attempt))
        self._remember(key, len(data))

    def get(self, key: str) -> bytes:
        name = self._name(key)
        for attempt in range(self._attempts):
            try:
                body = self._client().get_object(Bucket=self.bucket, Key=name)["Body"]
            except _boto_errors() as error:
                raise self._failure("read", key, error) from error
            try:
                return body.read()
            # botocore repeats requests, but not the reading of an answer that broke off or has a wrong checksum.
            except _boto_errors() as error:
                if attempt + 1 == self._attempts:
                    raise self._failure("read", key, error) from error
                time.sleep(_pause_s(attempt))
            finally:
                body.close()
        raise AssertionError("the last attempt returns or raises")

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        check_prefix(prefix)
        with self._lock:
            deadline, listing = self._listings.get(prefix, (0.0, {}))
            if time.monotonic() < deadline:
                return dict(listing)
            changes = self._changes
        try:
            listing = self._list_pages(prefix)
        except _boto_errors() as error:
            raise self._failure("list", prefix or "everything", error) from error
        with self._lock:
            # A write of another thread may have been too late for the pages and too early for the memory.
            if changes == self._changes:
                self._listings[prefix] = (time.monotonic() + self._listing_lifetime_s, dict(listing))
        return listing

    def delete(self, key: str) -> None:
        try:
            self._client().delete_object(Bucket=self.bucket, Key=self._name(key))
        except _boto_errors() as error:
            raise self._failure("delete", key, error) from error
        self._remember(key, None)

    def exists(self, key: str) -> bool:
        try:
            self._client().head_object(Bucket=self.bucket, Key=self._name(key))
        except _boto_errors() as error:
            failure = self._failure("find", key, error)
            if isinstance(failure, MissingKeyError):
                return False
            raise failure from error
        return True

    def recover(self, prefix: str, history: History | None = None) -> None:
        """Abort uploads in parts that a killed writer left; they are invisible but cost money."""
        where = self._folder(prefix)
        # Not every account may list uploads, and what is left behind harms no reader.
        with contextlib.suppress(*_boto_errors()):
            for upload in self._client().list_multipart_uploads(Bucket=self.bucket, Prefix=where).get("Uploads", []):
                self._client().abort_multipart_upload(
                    Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def send(self, key: str) -> None:
        check_key(key)

    def flush(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return ()

    def lock_path(self, prefix: str) -> Path:
        """A bucket has no locks: this one excludes the other processes of this machine and user."""
        user = os.getuid() if hasattr(os, "getuid") else "user"
        digest = hashlib.sha256(f"{self}/{check_prefix(prefix)}".encode()).hexdigest()[:32]
        return Path(tempfile.gettempdir()) / f"icl-locks-{user}" / digest

    def _name(self, key: str) -> str:
        check_key(key)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _folder(self, prefix: str) -> str:
        """What all names of objects below `prefix` begin with; the slash keeps run 1 from covering run 10."""
        return "".join(f"{part}/" for part in (self.prefix, check_prefix(prefix)) if part)

    def _client(self) -> Any:
        with self._lock:
            if self._cached_client is None:
                _import_boto3()
                from boto3.session import Session
                from botocore.config import Config

                connect_timeout_s, read_timeout_s = self._timeouts
                config = Config(
                    retries={"mode": "standard", "total_max_attempts": self._attempts},
                    connect_timeout=connect_timeout_s,
                    read_timeout=read_timeout_s,
                    tcp_keepalive=True,
                )
                self._cached_client = Session().client("s3", config=config)
            return self._cached_client

    def _put_whole(self, name: str, data: bytes) -> None:
        self._client().put_object(Bucket=self.bucket, Key=name, Body=data)

    def _put_in_parts(self, name: str, data: bytes) -> None:
        from boto3.s3.transfer import TransferConfig

        # Without threads: uploads already run beside the training, and the cores are its own.
        config = TransferConfig(multipart_threshold=self._multipart_bytes, use_threads=False)
        self._client().upload_fileobj(io.BytesIO(data), self.bucket, name, Config=config)

    def _list_pages(self, prefix: str) -> dict[str, int]:
        pages = (
            self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._folder(prefix))
        )
        start = len(self._folder(""))
        found = {entry["Key"][start:]: entry["Size"] for page in pages for entry in page.get("Contents", [])}
        return {key: size for key, size in found.items() if is_key(key)}

    def _remember(self, key: str, size: int | None) -> None:
        with self._lock:
            self._changes += 1
            for prefix, (_, listing) in self._listings.items():
                if not prefix or key.startswith(f"{prefix}/"):
                    listing.pop(key, None)
                    if size is not None:
                        listing[key] = size

    def _failure(self, verb: str, key: str, error: Exception) -> StorageError:
        code = _code(error)
        if code in _MISSING:
            return MissingKeyError(f"there is no {key} in {self}")
        if code in _EXPIRED | _REFUSED or "Credential" in type(error).__name__:
            # The next request looks for credentials again, and finds those that were renewed in the meantime.
            with self._lock:
                self._cached_client = None
        return StorageError(f"cannot {verb} {key} in {self}: {_explain(error, code)}")


_importing = threading.Lock()


def _import_boto3() -> None:
    """Import it in one thread at a time: of two that import parts of it at once, Python may stop one as deadlocked."""
    with _importing:
        import boto3.s3.transfer  # noqa: F401


def _boto_errors() -> tuple[type[Exception], ...]:
    _import_boto3()
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, Boto3Error


def _code(error: Exception) -> str:
    """The service's name of the error; empty if the service did not answer."""
    # Some botocore errors have the attribute without a response in it.
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))


def _pause_s(attempt: int) -> float:
    return min(0.1 * 2**attempt, 2.0)


def _explain(error: Exception, code: str) -> str:
    """What happened and what to do, in words that are ours alone: the service's own may quote keys or addresses."""
    name = type(error).__name__
    if code == "NoSuchBucket":
        return "there is no such bucket; create it or correct AWS_BUCKET_NAME"
    if code in _EXPIRED:
        return "the credentials have expired; renew them"
    if code in _REFUSED:
        return (
            f"the service refuses these credentials ({code}); check AWS_ACCESS_KEY_ID, its secret and its permissions"
        )
    if code == "RequestTimeTooSkewed":
        return "this machine's clock is wrong; set it"
    if code in _BUSY:
        return f"the service is overloaded ({code}); try again later"
    if code in _DAMAGED:
        return f"the data arrive damaged ({code}); check the network"
    if "Credential" in name or name == "TokenRetrievalError":
        return (
            "no usable credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
        )
    if name in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "ProxyConnectionError"):
        return f"the service cannot be reached ({name}); check the network and AWS_ENDPOINT_URL"
    if name == "ReadTimeoutError":
        return "the service did not answer in time; try again later"
    if name == "ParamValidationError":
        return "this is no valid bucket name; correct AWS_BUCKET_NAME"
    return f"{code or name}; try again, and ask `icl doctor` whether the bucket works"
