"""Notebooks that keep the history light: pictures with an 8-bit palette, as under figures/, and no times. `make notebooks` ends with it.

python -m benchmarks.notebooks
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from icl.figures.palette import with_palette
from icl.storage.files import write_atomically

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PNG = "image/png"


def lighter(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its pictures re-encoded, and without the times at which its cells ran, so that equal outputs are equal bytes. A
    picture that has a palette is left as it is."""
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if PNG in data:
                data[PNG] = _with_palette(data[PNG])
    return notebook


def _with_palette(encoded: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if picture.mode == "P":
        return encoded
    file = io.BytesIO()
    with_palette(picture).save(file, "PNG", optimize=True, dpi=picture.info.get("dpi", (100, 100)))
    return base64.b64encode(file.getvalue()).decode() + "\n"


def main() -> None:
    """Rewrite the notebooks."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        before = path.stat().st_size
        text = json.dumps(lighter(json.loads(path.read_text())), indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())
        print(f"{path.name}: {before:,} -> {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
