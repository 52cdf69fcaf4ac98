"""Progress of long work: on a terminal a bar with the time left, elsewhere a line every half minute."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0
REDRAW_EVERY_S = 0.1


class Update(Protocol):
    """Reports how far the work is. It is cheap enough to be called at every step."""

    def __call__(self, done: int, note: str = "", total: int | None = None) -> None: ...


@contextmanager
def progress_bar(description: str, total: int | None = None, console: Console | None = None) -> Iterator[Update]:
    """Yield an `Update`. The total may be given here or with each update."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(description, total, console)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")
        last = 0.0

        def update(done: int, note: str = "", total: int | None = total) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > REDRAW_EVERY_S:
                bar.update(task, completed=done, note=note, total=total)
                last = now

        yield update


def _plain_lines(description: str, expected: int | None, console: Console) -> Update:
    start = last = time.monotonic()
    first: int | None = None

    def update(done: int, note: str = "", total: int | None = expected) -> None:
        nonlocal last, first
        now = time.monotonic()
        if first is None:
            first = done  # a resumed run did these steps earlier, so they do not count for the rate
        if done != total and now - last < LINE_EVERY_S:
            return
        last = now
        rate = (done - first) / max(now - start, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and total and done < total else ""
        with suppress(OSError):  # a closed terminal does not stop the work
            console.print(f"{description}: {done}/{total or '?'}{left} {note}", highlight=False, soft_wrap=True)

    return update
