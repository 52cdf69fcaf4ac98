"""The schedule of an offline sweep: does many runs, some at a time.

A launcher starts one run, as a process on this machine or as a task on a Ray cluster. The schedule keeps a given number
of runs going. If one fails, the others go on. If it is told to stop, it stops all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from icl.execution.signals import stop_requests

POLL_S = 0.05
# Seconds after the request to stop: when a run that has not stopped is asked again, and when it is killed. They are long
# because a step may take seconds. A second Ctrl-C shortens them.
TELL_AGAIN_S = 60.0
END_S = 62.0


class State(StrEnum):
    """The state of a run of the sweep."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    SKIPPED = "done before"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Ended:
    """How a run ended. `reason` is one line, empty after a success."""

    ok: bool
    reason: str = ""


class Running(Protocol):
    """A run that was started."""

    def poll(self) -> Ended | None:
        """How the run ended, or None while it runs."""
        ...

    def note(self) -> str:
        """Its last report of progress."""
        ...

    def stop(self) -> None:
        """Ask the run to save its state and end."""
        ...

    def kill(self) -> None:
        """End the run at once."""
        ...


@dataclass
class ScheduledRun:
    """One run of a sweep and its state. Times are in seconds of `time.monotonic`."""

    name: str
    index: int
    state: State = State.WAITING
    reason: str = ""
    note: str = ""
    started: float = 0.0
    seconds: float = 0.0


Launch = Callable[[ScheduledRun], Running]
Show = Callable[[Sequence[ScheduledRun]], None]


def run_all(runs: Sequence[ScheduledRun], launch: Launch, jobs: int, show: Show = lambda runs: None) -> bool:
    """Do all waiting runs, `jobs` at a time; returns whether all runs are done.

    After the first signal to stop, the running ones are asked to save and end, and no other is started. After a second
    Ctrl-C they are asked again, and those that do not end are killed.
    """
    active: dict[int, Running] = {}
    with stop_requests() as asked:
        stopping, told_again = False, False
        while True:
            now = time.monotonic()
            for position, running in list(active.items()):
                run = runs[position]
                run.note, run.seconds = running.note(), now - run.started
                ended = running.poll()
                if ended is not None:
                    del active[position]
                    run.state = State.DONE if ended.ok else State.STOPPED if stopping else State.FAILED
                    run.reason = ended.reason
            if asked.first is not None and not stopping:
                stopping = True
                for running in active.values():
                    running.stop()
            if stopping:
                waited = now - (asked.first or now)
                if asked.impatient is not None:
                    waited = max(waited, TELL_AGAIN_S + now - asked.impatient)
                if waited >= TELL_AGAIN_S and not told_again:
                    told_again = True
                    for running in active.values():
                        running.stop()
                if waited > END_S:
                    for running in active.values():
                        running.kill()
            else:
                _start_next(runs, active, launch, jobs)
            show(runs)
            if not active and (stopping or all(run.state is not State.WAITING for run in runs)):
                return all(run.state in (State.DONE, State.SKIPPED) for run in runs)
            time.sleep(POLL_S)


def seconds_left(runs: Sequence[ScheduledRun], jobs: int) -> float | None:
    """How long the rest will take if the other runs last as long as those that are done; None before the first is done."""
    lengths = [run.seconds for run in runs if run.state is State.DONE]
    if not lengths:
        return None
    mean = sum(lengths) / len(lengths)
    rest = [mean for run in runs if run.state is State.WAITING]
    rest += [max(mean - run.seconds, 0.0) for run in runs if run.state is State.RUNNING]
    return sum(rest) / min(jobs, max(len(rest), 1))


def _start_next(runs: Sequence[ScheduledRun], active: dict[int, Running], launch: Launch, jobs: int) -> None:
    for position, run in enumerate(runs):
        if len(active) >= jobs:
            return
        if run.state is State.WAITING:
            run.started = time.monotonic()
            try:
                active[position] = launch(run)
                run.state = State.RUNNING
            except OSError as error:
                run.state, run.reason = State.FAILED, str(error)
