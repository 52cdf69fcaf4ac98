"""Requests to stop: signals, and a supervisor that is gone."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signal(supervisor: int | None = None) -> Iterator[Callable[[], bool]]:
    """Yields whether the work should stop: SIGINT or SIGTERM came, or the supervisor is no longer this process's parent.

    A second signal interrupts at once.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked or supervisor not in (None, os.getppid())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[Callable[[], float | None]]:
    """Yields a function that says when SIGINT or SIGTERM first came, or None."""
    at: float | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal at
        at = time.monotonic() if at is None else at

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: at
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
