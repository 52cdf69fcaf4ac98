"""A time limit for a whole operation, such as a request whose timeouts cover only its parts."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class DeadlineError(Exception):
    """The time was over before the work was done."""


class Deadline:
    """Runs a function in a thread of its own and stops waiting for it after some seconds.

    A trickle of bytes resets a socket's timeout again and again, so the limit must be set from outside. A thread that
    is given up on is a daemon: it ends when its function returns, or with the process.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def extend(self, seconds: float) -> None:
        """Give the function more time, because it made progress."""
        self._end += seconds

    def check(self) -> None:
        """Raise DeadlineError once the time is over. Loops call this, because nobody waits for them any more."""
        if time.monotonic() >= self._end:
            raise DeadlineError

    def run(self, act: Callable[[], T]) -> T:
        """Return what `act` returns, or raise what it raises.

        Raises:
            DeadlineError: `act` did not end in time.
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
