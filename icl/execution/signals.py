"""Requests to stop: signals, and the end of the supervisor (the process that started this one).

A person sends SIGINT (Ctrl-C). Schedulers, service managers and closed terminals send SIGTERM or SIGHUP. SIGXCPU, SIGUSR1
and SIGUSR2 warn of a limit. All of these mean "save and end". A scheduler may send several of them to every process of a
job, and each more than once. So only a second Ctrl-C, some seconds after the first, means "end at once".
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 75
"""Exit status of work that a scheduler stopped and that goes on when it is started again (EX_TEMPFAIL of sysexits.h)."""

PATIENCE_S = 2.0
"""The shortest time in seconds between two Ctrl-C that count as two."""

_ALWAYS = ("SIGINT", "SIGTERM")
_UNLESS_IGNORED = ("SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")  # if they are ignored, as under nohup, that stays so

_asked: set[int] = set()  # the signals of the newest `stop_requests`; they come to the process, so it keeps them


def status_of_stop() -> int:
    """The exit status of work that was stopped: `AGAIN` if a signal other than Ctrl-C asked for it, else 1."""
    return AGAIN if _asked - {signal.SIGINT} else 1


class StopRequests:
    """The requests to stop so far.

    Attributes:
        first: time of the first request, in seconds of `time.monotonic`; None before it.
        impatient: time of the second Ctrl-C; None before it.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.impatient: float | None = None
        self._interrupted: float | None = None

    def note(self, number: int) -> None:
        """Record a signal."""
        now = time.monotonic()
        self.first = now if self.first is None else self.first
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted >= PATIENCE_S:
                self.impatient = now if self.impatient is None else self.impatient
            self._interrupted = now if self._interrupted is None else self._interrupted


@contextmanager
def stop_requests(on_request: Callable[[StopRequests], None] = lambda requests: None) -> Iterator[StopRequests]:
    """Yield the requests so far. `on_request` is called at every signal and may raise."""
    requests = StopRequests()

    def note(number: int, frame: FrameType | None) -> None:
        _asked.add(number)
        requests.note(number)
        on_request(requests)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield requests
        return
    _asked.clear()
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
    """Yield a function that tells whether the work should stop, because of a signal or because the supervisor is gone.

    Before the work first calls this function, it only prepares and has nothing to save. So a signal ends it at once. After
    that, a signal makes the function return True, so that the work saves and ends; a second Ctrl-C ends it at once.
    """
    working = ending = False

    def interrupt(requests: StopRequests) -> None:
        nonlocal ending
        if requests.impatient is not None or not (working or ending):
            ending = True  # later signals must not interrupt the cleaning up
            raise KeyboardInterrupt

    with stop_requests(interrupt) as requests:

        def should_stop() -> bool:
            nonlocal working
            working = True
            return requests.first is not None or supervisor not in (None, os.getppid())

        yield should_stop
