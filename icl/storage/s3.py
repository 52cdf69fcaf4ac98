"""An S3 bucket as a store, or any service that speaks S3 (`AWS_ENDPOINT_URL`).

Credentials, region and endpoint come from boto3's own chain and appear in no message. boto3 is imported at the first
request, so that importing this module costs nothing.
"""

import base64
import contextlib
import hashlib
import io
import logging
import os
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from icl.storage.claims import CLAIM, Claim, Seen
from icl.storage.deadline import Deadline, DeadlineError
from icl.storage.keys import MissingKeyError, StorageError, check_key, check_prefix, is_key
from icl.storage.refusals import DAMAGED, EXPIRED, MISSING, REFUSED, NotS3Error, code_of, explain, status_of
from icl.storage.store import History

T = TypeVar("T")

_PART_BYTES = 8 * 2**20
_CHUNK_BYTES = 2**16
_SLOWEST = 100_000.0
"""Bytes a second below which a transfer is ended once its deadline is over."""
_LARGEST_BYTES = 4 * 2**30
_LARGEST_CLAIM_BYTES = 2**16
_CONFLICT = (409, 412)

_log = logging.getLogger(__name__)


class S3Store:
    """Values as objects of `bucket`, below `prefix`.

    Objects are visible whole or not at all, multipart uploads included. After a write, the checksum or the ETag in the
    answer must show what was sent; if it cannot, the value is read back and compared. Every download is verified
    against its checksum.

    Requests are retried in botocore's standard mode. One operation takes at most attempts x (connect timeout + read
    timeout) plus some seconds of backoff, 108 s by default. A large transfer may take longer, as long as it makes
    100 kB per second. A listing of many pages may take three times as long. Every failure is a `StorageError`.

    Args:
        bucket: its name.
        prefix: folder in the bucket that all keys are below; empty for the whole bucket.
        connect_timeout_s, read_timeout_s: of one attempt, in seconds.
        attempts: how often one request is tried.
        multipart_bytes: larger values are sent in parts of 8 MiB.
        listing_lifetime_s: how long a listing is remembered. This store's own writes and deletes show at once, those
            of others after this time. A listing costs one request per 1000 keys.
        claim_lifetime_s: see `icl.storage.claims.Claim`.
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
        claim_lifetime_s: float = 60.0,
    ) -> None:
        self.bucket = bucket
        self.prefix = check_prefix(prefix.strip("/"))
        self._timeouts = (connect_timeout_s, read_timeout_s)
        self._attempts = attempts
        self._deadline_s = attempts * (connect_timeout_s + read_timeout_s) + 2.0 ** (attempts - 1)
        self._multipart_bytes = multipart_bytes
        self._listing_lifetime_s = listing_lifetime_s
        self._claim_lifetime_s = claim_lifetime_s
        self._lock = threading.Lock()
        self._making_client = threading.Lock()
        self._cached_client: Any = None
        self._listings: dict[str, tuple[float, dict[str, int]]] = {}
        self._changes = 0
        self._claims: dict[str, Claim] = {}
        self._versions: dict[str, tuple[str, int]] = {}
        self._conditional: bool | None = None  # None: not tried yet

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        name = self._name(key)
        send = _put_whole if len(data) <= self._multipart_bytes else _put_in_parts
        with self.claim(_folder_of(key)).writing():
            self._ask(
                "write",
                key,
                lambda client, deadline: self._send(lambda: send(client, self.bucket, name, data, deadline)),
                len(data),
            )
        self._remember(key, len(data))

    def put_longer(self, key: str, data: bytes) -> None:
        """`put` a file that only grows, unless a longer one is there. Never replaces a version this store has not seen."""
        name = self._name(key)
        with self.claim(_folder_of(key)).writing():
            for _ in range(3):
                version, length = self._versions.pop(key, None) or self._ask(
                    "find", key, lambda client, _: self._find(client, name)
                )
                if length > len(data):
                    return
                put = self.put_if(key, data, version)
                if put is not None:
                    self._versions[key] = (put, len(data))
                    self._remember(key, len(data))
                    return
        raise StorageError(f"cannot write {key} in {self}: another process writes it too; stop one of them")

    def get(self, key: str) -> bytes:
        name = self._name(key)
        return self._ask("read", key, lambda client, deadline: self._receive(client, name, deadline))

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        check_prefix(prefix)
        with self._lock:
            deadline, listing = self._listings.get(prefix, (0.0, {}))
            if time.monotonic() < deadline:
                return dict(listing)
            changes = self._changes
        listing = self._ask(
            "list", prefix or "everything", lambda client, deadline: self._list_pages(client, prefix, deadline)
        )
        with self._lock:
            # Another thread may have written since the pages were read. Such a listing is not remembered.
            if changes == self._changes:
                self._listings[prefix] = (time.monotonic() + self._listing_lifetime_s, dict(listing))
        return listing

    def delete(self, key: str) -> None:
        name = self._name(key)

        def remove(client: Any, _: Deadline) -> None:
            answer = client.delete_object(Bucket=self.bucket, Key=name)
            if answer["ResponseMetadata"]["HTTPStatusCode"] != 204:
                raise NotS3Error("the service does not confirm that it deleted")

        with self.claim(_folder_of(key)).writing():
            self._ask("delete", key, remove)
        self._versions.pop(key, None)
        self._remember(key, None)

    def exists(self, key: str) -> bool:
        name = self._name(key)
        try:
            self._ask("find", key, lambda client, _: _tagged(client.head_object(Bucket=self.bucket, Key=name)))
        except MissingKeyError:
            return False
        return True

    def recover(self, prefix: str, history: History | None = None) -> None:
        """Abort multipart uploads that a killed writer left. They are invisible but cost money."""
        where = self._folder(prefix)

        def abort(client: Any, _: Deadline) -> None:
            uploads = client.list_multipart_uploads(Bucket=self.bucket, Prefix=where).get("Uploads", [])
            for upload in [each for each in uploads if each["Key"].startswith(where)]:
                client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

        # Not every account may list uploads, and an upload that is left behind harms no reader.
        with contextlib.suppress(StorageError), self.claim(prefix).writing():
            self._ask("clear", prefix, abort)

    def send(self, key: str) -> None:
        check_key(key)

    def flush(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return ()

    def lock_path(self, prefix: str) -> Path:
        """A lock file that excludes other processes of this user on this machine. `claim` excludes other machines."""
        digest = hashlib.sha256(f"{self}/{check_prefix(prefix)}".encode()).hexdigest()[:32]
        return _lock_folder() / digest

    def claim(self, prefix: str) -> Claim:
        with self._lock:
            if prefix not in self._claims:
                name = f"{prefix}/{CLAIM}" if prefix else CLAIM
                self._claims[prefix] = Claim(self, name, self._claim_lifetime_s)
            return self._claims[prefix]

    # Versions of objects (`icl.storage.claims.VersionedObjects`)

    def look(self, name: str) -> Seen | None:
        """See `VersionedObjects`, also for the three methods below. Raises `StorageError`."""
        try:
            return self._ask("read", name, lambda client, deadline: self._look(client, name, deadline))
        except MissingKeyError:
            return None

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        """A conditional write. If the service does not support these, the present version is read and compared first;
        `try_conditions` warns about that."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def put(client: Any, deadline: Deadline) -> str | None:
            whole = self._object(name)
            if self._conditional is not False:
                try:
                    return self._send(lambda: _put_whole(client, self.bucket, whole, data, deadline, **condition))
                except Exception as error:
                    if status_of(error) in _CONFLICT or (version is not None and code_of(error) in MISSING):
                        return None
                    if self._conditional or not _knows_no_conditions(error):
                        raise
            if self._find(client, whole)[0] != version:
                return None
            put = self._send(lambda: _put_whole(client, self.bucket, whole, data, deadline))
            self._set_conditional(False)
            return put

        return self._ask("write", name, put, len(data))

    def forget(self) -> None:
        """Forget all listings."""
        with self._lock:
            self._changes += 1
            self._listings.clear()
            self._versions.clear()

    def try_conditions(self, name: str, data: bytes) -> bool:
        """Try two conditional writes that must fail."""

        def refuses(client: Any, **condition: str) -> bool:
            try:
                client.put_object(Bucket=self.bucket, Key=self._object(name), Body=data, **condition)
            except Exception as error:
                if status_of(error) in _CONFLICT:
                    return True
                if not _knows_no_conditions(error):
                    raise
            return False

        def refuses_both(client: Any, _: Deadline) -> bool:
            return refuses(client, IfNoneMatch="*") and refuses(client, IfMatch='"0"')

        if self._conditional is None:
            self._set_conditional(self._ask("write", name, refuses_both))
        return bool(self._conditional)

    def _set_conditional(self, able: bool) -> None:
        if self._conditional is None and not able:
            _log.warning(
                "%s makes no conditional writes: two machines that start the same run at the same moment may both write it",
                self,
            )
        self._conditional = able

    # Names

    def _name(self, key: str) -> str:
        return self._object(check_key(key))

    def _object(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _folder(self, prefix: str) -> str:
        """The beginning of the names of all objects below `prefix`. It ends in a slash, so run 1 does not match run 10."""
        return "".join(f"{part}/" for part in (self.prefix, check_prefix(prefix)) if part)

    # Requests

    def _client(self) -> Any:
        with self._making_client:
            if self._cached_client is None:
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

    def _ask(self, verb: str, key: str, act: Callable[[Any, Deadline], T], sent_bytes: int = 0) -> T:
        """Return what `act` returns for the client and the deadline. Whatever it raises becomes a `StorageError`."""
        _import_boto3()  # before the deadline starts: importing is not the service's time
        deadline = Deadline(self._deadline_s + sent_bytes / _SLOWEST)

        def work() -> T:
            client = self._client()
            try:
                return act(client, deadline)
            except ValueError as error:
                # boto3's own errors are classes. A plain ValueError is of a number or a date in an answer.
                raise NotS3Error("the answer cannot be read") if type(error) is ValueError else error from None

        try:
            return deadline.run(work)
        # Any class: boto3's own errors, those of its HTTP libraries, and plain ValueErrors for wrong settings.
        except Exception as error:
            raise self._failure(verb, key, error) from None  # the cause's text may hold an address with a password

    def _send(self, send: Callable[[], str]) -> str:
        """Repeat a request whose body arrived damaged. botocore does not repeat these."""
        return self._repeated(send, lambda error: code_of(error) in DAMAGED)

    def _repeated(self, act: Callable[[], T], again: Callable[[Exception], bool]) -> T:
        for attempt in range(self._attempts - 1):
            try:
                return act()
            except Exception as error:
                if not again(error):
                    raise
            time.sleep(min(0.1 * 2**attempt, 2.0))
        return act()

    def _receive(self, client: Any, name: str, deadline: Deadline) -> bytes:
        # botocore does not repeat a read that broke off or had a wrong checksum, so it is repeated here.
        def read() -> bytes:
            return _body(client.get_object(Bucket=self.bucket, Key=name), deadline)

        return self._repeated(
            read, lambda error: not status_of(error) and not isinstance(error, NotS3Error | DeadlineError)
        )

    def _look(self, client: Any, name: str, deadline: Deadline) -> Seen:
        answer = client.get_object(Bucket=self.bucket, Key=self._object(name))
        data = _body(answer, deadline, _LARGEST_CLAIM_BYTES)
        try:
            served = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            age_s = (served - answer["LastModified"]).total_seconds() - 1.0  # both are rounded down to seconds
        except (KeyError, ValueError, TypeError, OverflowError):
            age_s = None
        return Seen(data, _version_of(answer), age_s)

    def _find(self, client: Any, name: str) -> tuple[str | None, int]:
        """The object's version and length; (None, 0) if there is none."""
        try:
            answer = client.head_object(Bucket=self.bucket, Key=name)
        except Exception as error:
            if code_of(error) in MISSING:
                return None, 0
            raise
        return _version_of(answer), answer["ContentLength"]

    def _list_pages(self, client: Any, prefix: str, deadline: Deadline) -> dict[str, int]:
        found: dict[str, int] = {}
        where, start, goes_on = self._folder(prefix), len(self._folder("")), False
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=where)
        for number, page in enumerate(pages):
            deadline.check()
            if number == 0:
                deadline.extend(2 * self._deadline_s)
            entries = _entries(page, where)
            if entries and entries.keys() <= found.keys():
                raise NotS3Error("the listing goes in a circle")
            found |= entries
            goes_on = page["IsTruncated"]
        if goes_on:
            raise NotS3Error("the listing breaks off")
        return {name[start:]: size for name, size in found.items() if is_key(name[start:])}

    def _remember(self, key: str, size: int | None) -> None:
        with self._lock:
            self._changes += 1
            for prefix, (_, listing) in self._listings.items():
                if not prefix or key.startswith(f"{prefix}/"):
                    listing.pop(key, None)
                    if size is not None:
                        listing[key] = size

    def _failure(self, verb: str, key: str, error: Exception) -> StorageError:
        if isinstance(error, StorageError):
            return error
        code = code_of(error)
        if verb in ("read", "find") and code in MISSING:
            return MissingKeyError(f"there is no {key} in {self}")
        if code in EXPIRED | REFUSED or "Credential" in type(error).__name__:
            # The next request makes a new client, which finds credentials that were renewed in the meantime.
            self._cached_client = None
        return StorageError(f"cannot {verb} {key} in {self}: {explain(error)}")


_importing = threading.Lock()


def _lock_folder() -> Path:
    """The folder with this user's lock files for buckets, below the system's temporary folder.

    Raises:
        StorageError: the folder belongs to another user, who could remove the locks.
    """
    if not hasattr(os, "getuid"):  # Windows: each user has a temporary folder
        return Path(tempfile.gettempdir()) / "icl-locks"
    folder = Path(tempfile.gettempdir()) / f"icl-locks-{os.getuid()}"
    with contextlib.suppress(FileNotFoundError):
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            raise StorageError(
                f"{folder} belongs to another user, who could remove locks; remove it, or set TMPDIR to a folder of your own"
            )
        if about.st_mode & 0o022:
            folder.chmod(0o700)
    return folder


def _import_boto3() -> None:
    """Import boto3 in one thread at a time. Two threads that import its parts at once may deadlock each other."""
    with _importing:
        import boto3.s3.transfer  # noqa: F401


def _knows_no_conditions(error: Exception) -> bool:
    return status_of(error) in (405, 501) or code_of(error) in ("InvalidArgument", "InvalidRequest", "400")


def _folder_of(key: str) -> str:
    return key.rpartition("/")[0]


def _put_whole(client: Any, bucket: str, name: str, data: bytes, deadline: Deadline, **condition: str) -> str:
    """Write an object in one request and return its version."""
    answer = _tagged(client.put_object(Bucket=bucket, Key=name, Body=data, **condition))
    if not _shows(answer, data, _md5(data).hex()):
        _demand_stored(client, bucket, name, data, deadline)
    return _version_of(answer)


def _put_in_parts(client: Any, bucket: str, name: str, data: bytes, deadline: Deadline) -> str:
    from boto3.s3.transfer import TransferConfig

    # Without threads: uploads run beside the training, which needs the cores.
    config = TransferConfig(multipart_threshold=1, multipart_chunksize=_PART_BYTES, use_threads=False)
    client.upload_fileobj(io.BytesIO(data), bucket, name, Config=config)
    answer = _tagged(client.head_object(Bucket=bucket, Key=name))
    parts = [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)]
    tag = f"{_md5(b''.join(map(_md5, parts))).hex()}-{len(parts)}"
    if not _shows(answer, data, tag):
        _demand_stored(client, bucket, name, data, deadline)
    return _version_of(answer)


def _tagged(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer about an object, if it is one: every object has an ETag."""
    if not answer.get("ETag", "").strip('W/"'):
        raise NotS3Error("the service answers without an ETag")
    return answer


def _version_of(answer: Mapping[str, Any]) -> str:
    """The ETag in the form that conditions compare. A proxy that packs answers makes it a weak one, W/"..."."""
    return _tagged(answer)["ETag"].removeprefix("W/")


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _shows(answer: Mapping[str, Any], data: bytes, tag: str) -> bool:
    """Whether an answer of success shows that these bytes arrived: by their checksum if it has one, else by the ETag."""
    if "ChecksumCRC32" in answer:
        return answer["ChecksumCRC32"] == base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    return answer["ETag"].strip('"') == tag


def _demand_stored(client: Any, bucket: str, name: str, data: bytes, deadline: Deadline) -> None:
    """Read an object back and compare, where the answer shows neither (some encryptions)."""
    if _body(client.get_object(Bucket=bucket, Key=name), deadline, len(data) + _CHUNK_BYTES) != data:
        raise NotS3Error("the service answers with success, but does not have what was sent")


def _entries(page: Mapping[str, Any], where: str) -> dict[str, int]:
    """Name and size of every object on one page of a listing of the names that begin with `where`."""
    if "IsTruncated" not in page or page.get("Prefix", where) != where:
        raise NotS3Error("the answer is not a listing of this folder")
    entries = {entry["Key"]: entry["Size"] for entry in page.get("Contents", [])}
    if not all(name.startswith(where) and size >= 0 for name, size in entries.items()):
        raise NotS3Error("the listing names what cannot be in this folder")
    return entries


def _body(answer: Mapping[str, Any], deadline: Deadline, most: int | None = None) -> bytes:
    """The body of an answer. Every chunk extends the deadline, so a large value has time enough and a trickle ends.

    Args:
        most: the largest number of bytes that is read; that of the largest value of icl by default.
    """
    chunks, length = [], 0
    with contextlib.closing(answer["Body"]) as body:
        _demand_whole(_tagged(answer))
        while chunk := body.read(_CHUNK_BYTES):
            deadline.check()
            chunks.append(chunk)
            length += len(chunk)
            deadline.extend(len(chunk) / _SLOWEST)
            if length > (_LARGEST_BYTES if most is None else most):
                raise NotS3Error("the value is larger than any that icl writes")
    return b"".join(chunks)


def _demand_whole(answer: Mapping[str, Any]) -> None:
    """Refuse an answer with a part of the value, with another form of it, or with a body whose end cannot be told."""
    about = answer["ResponseMetadata"]
    encodings = {each.strip().lower() for each in answer.get("ContentEncoding", "").split(",")}
    if about["HTTPStatusCode"] != 200 or "ContentRange" in answer:
        raise NotS3Error("the answer is not the whole value")
    if encodings - {"", "identity", "aws-chunked"}:  # the last is a form of uploads that some services keep
        raise NotS3Error("a proxy packed the value on its way")
    if answer.get("ContentLength", -1) < 0 and about["HTTPHeaders"].get("transfer-encoding", "").lower() != "chunked":
        raise NotS3Error("the answer does not say where the value ends")
