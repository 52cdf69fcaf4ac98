"""The code in the pages: its blocks, and running those in Python with what they print.

A block's language stands behind its fence, and a title names the file that it is: ```yaml title="my-sweep.yaml". A block in Python is
followed by a block of `text` if it prints something: the output.
"""

import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        language: `sh`, `python`, `yaml`, `text`, ...
        title: the name of the file that it is, or None.
        place: where the code begins and ends in the page's text.
    """

    language: str
    title: str | None
    code: str
    place: tuple[int, int]


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page in their order."""
    return [
        Block(found["language"], found["title"], found["code"], found.span("code")) for found in FENCE.finditer(text)
    ]


def run(code: str, names: dict[str, Any], source: str) -> str:
    """Run Python with these names, which it changes; what it prints."""
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(code, source, "exec"), names)
    return printed.getvalue()


def run_page(page: Path) -> tuple[dict[str, Any], list[tuple[Block, str]]]:
    """Run the Python of a page, one block after the other.

    Returns:
        The names at the end; and for each block of output the text that its code printed.
    """
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": page.stem}
    outputs, printed = [], ""
    for block in blocks:
        if block.language == "python":
            printed = run(block.code, names, str(page))
        elif block.language == "text" and printed:
            outputs.append((block, printed))
            printed = ""
    return names, outputs


def with_outputs(text: str, outputs: list[tuple[Block, str]]) -> str:
    """The page with what its code printed in its blocks of output."""
    for block, printed in reversed(outputs):
        text = text[: block.place[0]] + printed + text[block.place[1] :]
    return text
