"""An end to waiting: for what has a timeout for every part but none for the whole, such as a request."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class DeadlineError(Exception):
    """The time was over before the work was done."""


class Deadline:
    """Runs a function in a thread of its own and stops waiting for it after some seconds.

    A trickle of bytes resets every timeout of a socket; only who stands outside can end it. The thread that is left
    behind is a daemon: it ends with its answer, or with the process.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def extend(self, seconds: float) -> None:
        """Give the function more time, because it got on."""
        self._end += seconds

    def check(self) -> None:
        """Raise DeadlineError once the time is over: work that goes in a circle ends with it, for nobody waits any more."""
        if time.monotonic() >= self._end:
            raise DeadlineError

    def run(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises.

        Raises:
            DeadlineError: it does neither in time.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(act())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="under a deadline", daemon=True)
        thread.start()
        while thread.is_alive() and (left := self._end - time.monotonic()) > 0:
            thread.join(left)
        if results:
            return results[0]
        raise errors[0] if errors else DeadlineError
