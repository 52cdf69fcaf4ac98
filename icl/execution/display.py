"""The display of an offline sweep: a live table on a terminal, a line per event elsewhere, and a table at the end."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from icl.execution.schedule import ScheduledRun, Show, State, seconds_left

_COLOURS = {
    State.WAITING: "dim",
    State.RUNNING: "cyan",
    State.DONE: "green",
    State.SKIPPED: "green dim",
    State.FAILED: "red",
    State.STOPPED: "yellow",
}
# The order of rows if a terminal is too small for all: the most important first.
_ORDER = (State.RUNNING, State.FAILED, State.STOPPED, State.WAITING, State.DONE, State.SKIPPED)


@contextmanager
def runs_display(jobs: int, console: Console | None = None) -> Iterator[Show]:
    """Yield a function that shows the runs' states whenever it is called. Print a table of all runs at the end."""
    console = console or Console(stderr=True)
    last: list[ScheduledRun] = []
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            drawn = _Throttle()

            def draw(runs: Sequence[ScheduledRun]) -> None:
                last[:] = runs
                if drawn.is_due(runs):
                    live.update(runs_table(runs, jobs, max(console.height - 6, 5)), refresh=True)

            yield draw
    else:
        said: dict[int, State] = {}

        def say(runs: Sequence[ScheduledRun]) -> None:
            last[:] = runs
            for run in runs:
                if run.state is not said.get(run.index, State.WAITING):
                    said[run.index] = run.state
                    reason = f": {run.reason}" if run.reason else ""
                    line = Text(f"[{run.index}] {run.name} {run.state}{reason}")
                    console.print(line, highlight=False, soft_wrap=True)

        yield say
    console.print(runs_table(last, jobs, None))


def runs_table(runs: Sequence[ScheduledRun], jobs: int, rows: int | None) -> Table:
    """The runs' states as a table of at most `rows` rows. Running and failed runs come first if not all fit."""
    table = Table(caption=headline(runs, jobs), caption_justify="left")
    table.add_column("#", justify="right")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    table.add_column("time", justify="right")
    shown = (
        list(runs)
        if rows is None or len(runs) <= rows
        else sorted(runs, key=lambda run: _ORDER.index(run.state))[:rows]
    )
    remarks = [run.reason or (run.note if run.state is State.RUNNING else "") for run in shown]
    if any(remarks):
        table.add_column("", overflow="fold")
    for run, remark in zip(shown, remarks, strict=True):
        colour = _COLOURS[run.state]
        time_taken = _duration(run.seconds) if run.seconds else ""
        row = [str(run.index), run.name, Text(run.state, colour), time_taken, Text(remark)]
        table.add_row(*row[: len(table.columns)])
    return table


def headline(runs: Sequence[ScheduledRun], jobs: int) -> str:
    """How many runs are in each state, and the time left, such as `3 done, 1 failed, 2 running; about 0:02:10 left`."""
    counts = Counter(run.state for run in runs)
    text = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
    if not counts[State.WAITING] and not counts[State.RUNNING]:
        return text
    left = seconds_left(runs, jobs)
    return text if left is None else f"{text}; about {_duration(left)} left"


class _Throttle:
    """Decides when to redraw: when a state changes, and otherwise twice a second, because drawing is slow."""

    def __init__(self) -> None:
        self._states: list[State] = []
        self._calls = 0

    def is_due(self, runs: Sequence[ScheduledRun]) -> bool:
        states = [run.state for run in runs]
        self._calls += 1
        if states == self._states and self._calls % 10:
            return False
        self._states = states
        return True


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
