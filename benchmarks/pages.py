"""Tables inside pages that people write: the text between two marks, made anew from files."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

END = "<!-- end of that table -->"


def rows_of(table: pd.DataFrame) -> Iterable[Any]:
    """The rows, with the columns as attributes, which no type checker knows."""
    return table.itertuples()


def mark(command: str, name: str = "") -> str:
    """The line before a table; one command that makes several tells them apart by name."""
    return f"<!-- {name + ', ' if name else ''}made by `{command}`; do not edit -->"


def fill(text: str, start: str, content: str) -> str:
    """The page with what stands between the mark `start` and the next end of a table replaced.

    Raises:
        ValueError: the mark is not there exactly once, or no end follows it.
    """
    if text.count(start) != 1 or END not in (after := text.split(start)[1]):
        raise ValueError(f"the page needs the lines {start} and {END}, once and in this order")
    return f"{text.split(start)[0]}{start}\n\n{content}\n\n{END}{after.split(END, 1)[1]}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def with_error(value: float, error: float, sign: str = "") -> str:
    """An estimate ± its standard error; two decimals where the error is below 0.1."""
    digits = 1 if error >= 0.1 else 2
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"
