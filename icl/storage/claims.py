"""One writer per folder of a bucket, over all machines.

A writer claims a folder with an object beside the folder's files, the claim. It makes and renews the claim with
conditional writes: they succeed only on the version of the object that the writer saw last. Where the service supports
these, two machines never hold one claim.

A claim that is not renewed for its lifetime may be taken over. Its age is how long this process has watched it unchanged.
The service's own clock may tell the age at once. A proxy before the service may have another clock, so the claim is then
watched for a third of the lifetime, in which a living writer renews it. Clocks of two machines are never compared.

A writer trusts its claim for three quarters of the lifetime. After that it renews the claim before it writes anything.
A writer that was frozen or cut off thus learns that its folder was taken over before it overwrites the other's files.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from icl.storage.keys import StorageError
from icl.storage.locks import Holder, RunInUseError

CLAIM = ".claim"
"""The claim's name in its folder. It is not a valid key, so no listing shows it."""

_REFUSALS = 10
"""So many writes of a claim may fail although nobody has it. After that the service is not believed."""

_tokens: set[str] = set()
"""The tokens of all claims that this process made."""

_log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """An object as it was read: its bytes, its version, and its age in seconds by the service's clock, if it says."""

    data: bytes
    version: str
    age_s: float | None


class VersionedObjects(Protocol):
    """What a claim needs from a bucket. Names are not checked here, because a claim's name is not a key."""

    def look(self, name: str) -> Seen | None:
        """The object, or None."""
        ...

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        """Replace this version of the object, or make the object if `version` is None.

        Returns:
            The new version, or None if another version is there.
        """
        ...

    def forget(self) -> None:
        """Forget all listings that were made while other processes could write."""
        ...

    def try_conditions(self, name: str, data: bytes) -> bool:
        """Whether the bucket supports conditional writes, so that `put_if` excludes other writers.

        It is tried once, on an object that exists. A warning says so if the bucket does not support them.
        """
        ...


class _Record(NamedTuple):
    """What a claim's object holds. `serial` counts renewals, so that every renewal changes the object's version."""

    holder: Holder
    place: str | None
    token: str
    serial: int
    free: bool


class Claim:
    """A folder's claim, as one process sees it.

    Args:
        name: of the object.
        lifetime_s: how long a claim that is not renewed is respected. It is renewed four times as often.
    """

    def __init__(self, bucket: VersionedObjects, name: str, lifetime_s: float = 60.0) -> None:
        self._bucket = bucket
        self._name = name
        self._lifetime_s = lifetime_s
        self._token = secrets.token_hex(8)
        _tokens.add(self._token)
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._subject = ""  # set once held
        self._held = False
        self._version: str | None = None
        self._serial = 0
        self._trusted_until = 0.0
        self._lost = ""
        self._busy = threading.RLock()

    @contextlib.contextmanager
    def held(self, subject: str, wait_s: float = 1.0) -> Iterator[None]:
        """Hold the claim for the length of a `with` block, and renew it in the background.

        A process that renews its claim keeps it. A claim that nobody renews is taken over once its lifetime is over, or
        at once if its process was on this machine and is dead. If the bucket does not answer, it is asked again before
        every write.

        Raises:
            RunInUseError: another process has the claim, or took it over before the end of the block.
        """
        self._subject, self._held, self._lost, self._version = subject, True, "", None
        try:
            try:
                self._acquire(wait_s)
            except RunInUseError:
                raise
            except StorageError:
                pass  # `writing` asks again before every write
            over = threading.Event()
            threading.Thread(target=self._renew_until, args=(over,), name=f"claim on {subject}", daemon=True).start()
            try:
                yield
            finally:
                over.set()
                self._held = False
                if self._is_trusted():
                    with contextlib.suppress(StorageError):
                        self._release()
            self.confirm()
        finally:
            self._held = False

    def confirm(self) -> None:
        """Raise RunInUseError if another process is known to have taken the folder over. Makes no request."""
        if self._lost:
            raise RunInUseError(self._lost)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A `with` block around every write to the folder in the bucket.

        A write after the end of `held` takes the claim for its own length, unless another process had it in between.
        A folder that was never claimed may be written by every process.

        Raises:
            RunInUseError: another process took the folder over.
            StorageError: the service does not say whether the claim is still ours.
        """
        self.confirm()
        if self._subject and not self._is_trusted():
            with self._busy:
                self._acquire(0.0) if self._version is None else self._renew()
        try:
            yield
        finally:
            if self._subject and not self._held:
                with contextlib.suppress(StorageError):
                    self._release()

    def holder(self) -> Holder | None:
        """The process that has the folder now, or None."""
        seen = self._bucket.look(self._name)
        record = _parsed(seen)
        if seen is None or record is None or self._patience_s(seen, record) < self._lifetime_s:
            return None
        return record.holder

    def _is_trusted(self) -> bool:
        return _now() < self._trusted_until and not self._lost

    def _renew_until(self, over: threading.Event) -> None:
        pause_s = 0.0
        while not over.wait(pause_s):
            pause_s = self._lifetime_s / 4
            try:
                with self._busy:
                    if not self._held:
                        return
                    self._acquire(0.0) if self._version is None else self._renew()
                    if not self._held:  # the block ended during a long wait for an answer
                        self._release()
                        return
                    self._bucket.try_conditions(self._name, self._content())
            except RunInUseError:
                return
            except StorageError:
                continue  # the uploads meet the same outage and report it

    def _acquire(self, wait_s: float) -> None:
        with self._busy:
            began = watched_since = _now()
            watched, renewed, told, refusals = "", False, False, 0
            while True:
                seen = self._bucket.look(self._name)
                record = _parsed(seen)
                now = _now()
                if seen is not None and seen.version != watched:
                    renewed = watched != ""
                    watched, watched_since = seen.version, now
                left_s = 0.0 if seen is None else self._patience_s(seen, record) - (now - watched_since)
                if left_s <= 0.0:
                    if self._put(None if seen is None else seen.version):
                        self._bucket.forget()
                        return
                    refusals += 1  # another writer was quicker; the next look shows which
                    if refusals == _REFUSALS:
                        raise StorageError(
                            f"the claim on {self._subject} cannot be made: the service refuses every write of it, as if "
                            "another were there; check that AWS_ENDPOINT_URL leads to the bucket itself"
                        )
                    time.sleep(0.0 if refusals == 1 else self._lifetime_s / 30)
                    continue
                holder = record.holder if record else "another process"
                lives = renewed or (record is not None and _is_alive(record) is True)
                if lives and now - began >= wait_s:
                    self._lost = (
                        f"{self._subject} is in use by {holder}; wait for it, stop it, or choose another run name"
                    )
                    self.confirm()
                if not told and left_s < self._lifetime_s / 2:
                    told = True
                    _log.warning(
                        "%s seems to have lost its writer, %s; it is taken over once that is certain, in %.0f s or less",
                        self._subject, holder, left_s,
                    )  # fmt: skip
                time.sleep(self._lifetime_s / 30)

    def _patience_s(self, seen: Seen, record: _Record | None) -> float:
        """Seconds for which the claim must be watched without a renewal before it may be taken; 0 if nobody has it."""
        if record is not None and (record.free or record.token == self._token or _is_alive(record) is False):
            return 0.0
        return self._lifetime_s / 3 if (seen.age_s or 0.0) >= self._lifetime_s else self._lifetime_s

    def _renew(self) -> None:
        for _ in range(3):
            if self._put(self._version):
                return
            seen = self._bucket.look(self._name)
            record = _parsed(seen)
            if seen is not None and (record is None or record.token != self._token):
                holder = record.holder if record else "another process"
                self._lost = (
                    f"{self._subject} was taken over by {holder} while this process could not renew its claim; what it "
                    "has not sent stays on this machine. Start it again here when the other is done"
                )
                self.confirm()
            # The claim was removed with its folder, or our own request wrote it and the answer was lost.
            self._version = None if seen is None else seen.version
        raise StorageError(f"the claim on {self._subject} cannot be renewed; try again later")

    def _put(self, version: str | None, free: bool = False) -> bool:
        asked = _now()
        self._serial += 1
        put = self._bucket.put_if(self._name, self._content(free), version)
        if put is None:
            return False
        self._version = put
        self._trusted_until = 0.0 if free else asked + 0.75 * self._lifetime_s
        return True

    def _release(self) -> None:
        with self._busy:
            self._put(self._version, free=True)

    def _content(self, free: bool = False) -> bytes:
        holder = Holder(socket.gethostname(), os.getpid(), self._since)
        fields = {"place": _place(), "token": self._token, "serial": self._serial, "free": free}
        return (json.dumps({**holder._asdict(), **fields}) + "\n").encode()


class NoClaim:
    """The claim of a local folder. Its file lock suffices, so this does nothing."""

    @contextlib.contextmanager
    def held(self, subject: str, wait_s: float = 1.0) -> Iterator[None]:
        """Do nothing."""
        yield

    def confirm(self) -> None:
        """Do nothing."""

    def holder(self) -> Holder | None:
        """Nobody."""
        return None


def _parsed(seen: Seen | None) -> _Record | None:
    try:
        fields = json.loads(seen.data if seen else b"")
        holder = Holder(str(fields["host"])[:100], int(fields["pid"]), str(fields["since"])[:40])
        return _Record(holder, fields["place"], fields["token"], int(fields["serial"]), fields["free"] is True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _now() -> float:
    """Seconds on a clock that cannot be set and that also runs while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _place() -> str | None:
    """An identifier of this boot of this machine and container, within which process numbers are unique; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_alive(record: _Record) -> bool | None:
    """Whether the claim's process lives; None if that cannot be known from this machine."""
    if record.token in _tokens:
        return True
    if record.place is None or record.place != _place():
        return None
    if record.holder.pid == os.getpid():
        return False  # an earlier process that had our process number
    try:
        os.kill(record.holder.pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # the process is another user's, or the number is out of range
    return True
