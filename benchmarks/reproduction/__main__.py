"""The published numbers of arXiv 2402.02364 for linear regression beside ours: data/ in, docs/reproduction.md out.

    python -m benchmarks.reproduction

page.md is the page as people write it. What stands in braces there is filled in: each section has a module here, whose `facts` names its
tables and numbers. Tests hold the sentences around them to the same numbers.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.reproduction import (
    basin,
    boundaries,
    calibrated,
    dense,
    forms,
    grids,
    milestones,
    power,
    readings,
    restricted,
    seeds,
    settings,
    sixteen,
    stages,
    trained,
)
from benchmarks.reproduction.shipped import Shipped
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data" / "L2H4Minf"
TEMPLATE = Path(__file__).with_name("page.md")
OUTPUT = ROOT / "docs" / "reproduction.md"
SECTIONS = (
    settings,
    trained,
    milestones,
    stages,
    boundaries,
    power,
    dense,
    forms,
    basin,
    readings,
    seeds,
    calibrated,
    grids,
    restricted,
    sixteen,
)


def collect(runs: Sequence[Shipped]) -> dict[str, object]:
    """The facts of all sections."""
    found: dict[str, object] = {}
    for section in SECTIONS:
        facts = section.facts(runs)
        if taken := found.keys() & facts.keys():
            raise ValueError(f"{section.__name__} gives {sorted(taken)} once more")
        found |= facts
    return found


def document(facts: dict[str, object]) -> str:
    """The text of docs/reproduction.md."""
    return TEMPLATE.read_text().format(**facts)


if __name__ == "__main__":
    write_atomically(OUTPUT, document(collect(Shipped.runs(DATA))).encode())
    print(OUTPUT.relative_to(ROOT))
