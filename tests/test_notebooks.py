"""Notebooks say each thing once, draw figures that there are, and have no text that has lost its figure."""

import json
import re
from pathlib import Path

import pytest

from icl.figures.recipes import RECIPES

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
DRAWING = re.compile(r'^draw\("([^"]+)"', re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_in_order(path):
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    sources = [source for _, source in cells]
    assert len(set(sources)) == len(sources)
    names = [name for _, source in cells for name in DRAWING.findall(source)]
    assert names
    assert set(names) <= set(RECIPES)
    kinds = "".join(kind[0] for kind, _ in cells)
    assert "mm" not in kinds
