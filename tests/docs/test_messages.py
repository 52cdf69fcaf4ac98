"""The messages that docs/troubleshooting.md explains are those of the source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
GAP = "\0"


@cache
def texts() -> list[str]:
    """Every text in the source; what is filled in later is a gap."""
    found = []
    for path in sorted((ROOT / "icl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("{}", GAP))
    return found


def written(quoted: str) -> bool:
    """Whether a message is part of one text of the source. An ellipsis stands for anything."""
    parts = [part.strip() for part in quoted.split("…") if part.strip(" ;:")]
    whole = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return bool(parts) and any(map(whole.search, texts()))


def test_there_are_messages():
    assert len(QUOTED) > 30


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_message_is_in_the_source(quoted):
    assert written(quoted)


def test_what_is_nowhere_is_not_found():
    assert not written("the moon is not there; wait for the night")
    assert not written("unknown key …: ask your neighbour")
