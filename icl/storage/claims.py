"""One writer per folder of a bucket, on all machines: an object that only one of them can write at a time.

Who writes a folder claims it by an object beside its files, made and renewed by writes that succeed only on the version
that the writer saw last. A claim that is not renewed for its lifetime may be taken over. Its age is how long one has
watched it. Or it is what the service's own clock says; then a third of the lifetime is watched too, in which a living
writer renews it, because the clocks of a service and of a proxy before it may differ. No two machines' clocks are
compared. A writer trusts its claim for
three quarters of the lifetime and asks again before it writes anything after that, so that one that was frozen, or cut
off, finds out that it was taken over before it touches what the other has written.
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
"""The claim's name in its folder; not a key, so that no listing shows it."""

_REFUSALS = 10
"""Writes of a claim that fail although nobody has it, before the service is no longer believed."""

_tokens: set[str] = set()
"""Of the claims of this process."""

_log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """An object as it was read: its bytes, its version, and its age in seconds by the service's clock, if it says."""

    data: bytes
    version: str
    age_s: float | None


class VersionedObjects(Protocol):
    """What a claim asks of a bucket; names are not checked, for a claim's is not a key."""

    def look(self, name: str) -> Seen | None:
        """The object, or None."""
        ...

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        """Replace this version of the object, or make it if None; its new version, or None if another is there."""
        ...

    def forget(self) -> None:
        """Forget what was listed while others could write."""
        ...

    def try_conditions(self, name: str, data: bytes) -> bool:
        """Whether `put_if` excludes others here; tried once on an object that is there, and told if it cannot."""
        ...


class _Record(NamedTuple):
    """What a claim's object says; `serial` makes every renewal another version."""

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
        """Hold the claim for the length of a `with` block, renewing it in the background.

        Whoever has it and still renews it keeps it; one that was left behind is taken over when it has lapsed, at once
        if it is of a dead process of this machine. A bucket that does not answer is asked again before every write.

        Raises:
            RunInUseError: another process has it, or, at the end of the block, had taken it over.
        """
        self._subject, self._held, self._lost, self._version = subject, True, "", None
        try:
            try:
                self._acquire(wait_s)
            except RunInUseError:
                raise
            except StorageError:
                pass  # asked again before every write
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
        """Ask nobody; raises RunInUseError if another process is known to have taken the folder over."""
        if self._lost:
            raise RunInUseError(self._lost)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Every write of the folder to the bucket happens in such a block.

        After the time of `held`, a late write has the claim for its own length, if nobody had it in between; a folder
        that was never claimed may be written by all.

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
        """Who has the folder now, or None."""
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
                continue  # the uploads, which meet the same outage, tell it

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
                    refusals += 1  # another was quicker, whom the next look shows
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
        """For how long it must be watched without a renewal before it may be taken; 0 if it is nobody's."""
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
            # Removed with its folder; or written by us, in a request whose answer was lost.
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
    """The claim of a folder whose lock says all."""

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
    """Seconds on a clock that nobody sets and that counts the time in which the machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _place() -> str | None:
    """Where process numbers mean what they mean here: this boot of this machine, this container; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_alive(record: _Record) -> bool | None:
    """Whether the process lives; None if nothing here can tell."""
    if record.token in _tokens:
        return True
    if record.place is None or record.place != _place():
        return None
    if record.holder.pid == os.getpid():
        return False  # an earlier process with our number
    try:
        os.kill(record.holder.pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's, or no number at all
    return True
