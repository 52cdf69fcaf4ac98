"""Requests to stop: signals, and a supervisor that is gone.

A person sends SIGINT (Ctrl-C). Schedulers, service managers and closed terminals send SIGTERM or SIGHUP. SIGXCPU, SIGUSR1
and SIGUSR2 warn of a limit. All of them mean: save, then end. A scheduler may send several, and each more than once, to every
process of a job. So only a second Ctrl-C, some seconds after the first, means: end at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_S = 2.0
"""From one Ctrl-C to the next that is meant as another."""

_ALWAYS = ("SIGINT", "SIGTERM")
_UNLESS_IGNORED = ("SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")  # nohup, and who else ignores a signal, means it


class StopRequests:
    """The requests that came.

    Attributes:
        first: when the first came, in seconds of `time.monotonic`; None before.
        impatient: when a person asked for the second time; None before.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.impatient: float | None = None
        self._interrupted: float | None = None

    def note(self, number: int) -> None:
        """Take note of a signal."""
        now = time.monotonic()
        self.first = now if self.first is None else self.first
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted >= PATIENCE_S:
                self.impatient = now if self.impatient is None else self.impatient
            self._interrupted = now if self._interrupted is None else self._interrupted


@contextmanager
def stop_requests(on_request: Callable[[StopRequests], None] = lambda requests: None) -> Iterator[StopRequests]:
    """Yields what was asked so far; `on_request` is called at every signal and may raise."""
    requests = StopRequests()

    def note(number: int, frame: FrameType | None) -> None:
        requests.note(number)
        on_request(requests)

    if threading.current_thread() is not threading.main_thread():  # which alone may listen
        yield requests
        return
    listening = [getattr(signal, name) for name in (*_ALWAYS, *_UNLESS_IGNORED) if hasattr(signal, name)]
    before = {
        number: signal.getsignal(number)
        for number in listening
        if number.name in _ALWAYS or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        for number in before:
            signal.signal(number, note)
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def stop_signal(supervisor: int | None = None) -> Iterator[Callable[[], bool]]:
    """Yields whether the work should stop: it was asked to, or the supervisor is no longer this process's parent.

    Until the work asks for the first time it only prepares, and has nothing to save: a signal ends it at once, whatever
    it waits for. From then on it saves and ends, and a person's second Ctrl-C ends it at once.
    """
    working = ending = False

    def interrupt(requests: StopRequests) -> None:
        nonlocal ending
        if requests.impatient is not None or not (working or ending):
            ending = True  # others must not disturb what is put right on the way out
            raise KeyboardInterrupt

    with stop_requests(interrupt) as requests:

        def should_stop() -> bool:
            nonlocal working
            working = True
            return requests.first is not None or supervisor not in (None, os.getppid())

        yield should_stop
