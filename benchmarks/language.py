"""The published curve of the language model, with and without the artefact of its estimator.

    python -m benchmarks.language [--write]

Prints the changes over the published stages; --write puts them into docs/language.md and draws figures/language-published/.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.pages import fill, mark, markdown_table
from icl.figures.elements import numbers
from icl.figures.language import PUBLISHED_STAGES, published_curve
from icl.figures.style import save
from icl.sampling.online import artefact
from icl.sampling.presets import PRESETS
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "data" / "language-published" / "L2.csv"
PAGE = ROOT / "docs" / "language.md"
MARK = mark("python -m benchmarks.language --write")


def corrected() -> pd.DataFrame:
    """The published table with λ̂ less its artefact, and the spread over the loss beside that of the artefact alone."""
    table, preset = pd.read_csv(TABLE), PRESETS["published-language"]
    added, spread = artefact(preset.inverse_temperature, preset.num_chains, preset.num_draws, 1.0)
    return table.assign(
        llc_corrected=table["llc_mean_raw"] - added * table["test_loss"],
        std_over_loss=table["llc_std_raw"] / table["test_loss"],
        artefact_spread=spread,
    )


def stage_rows(table: pd.DataFrame) -> list[list[str]]:
    """Stage, end, and the changes of the loss and of both curves over it."""
    known = table.dropna(subset=["llc_mean_raw"])
    steps = numbers(known, "step")
    curves = [numbers(known, name) for name in ("test_loss", "llc_mean_raw", "llc_corrected")]
    rows, start = [], 0
    for stage, end in PUBLISHED_STAGES.items():
        last = int(np.searchsorted(steps, end, side="right")) - 1
        rows.append([stage, f"{steps[last]:,.0f}", *(f"{curve[last] - curve[start]:+.2f}" for curve in curves)])
        start = last
    return rows


def page_table(table: pd.DataFrame) -> str:
    """The content of docs/language.md that is made here."""
    head = ["stage", "end", "change of the loss", "change of λ̂, as published", "change of λ̂ less the artefact"]
    ratio = table["std_over_loss"].dropna()
    spread = float(table["artefact_spread"].iloc[0])
    said = (
        f"The published spread over chains is {ratio.mean():.2f} ± {ratio.std():.2f} times the loss (mean and standard deviation over "
        f"{len(ratio)} checkpoints). The artefact alone makes {spread:.2f}."
    )
    return f"{markdown_table(head, stage_rows(table))}\n\n{said}"


def main() -> None:
    """Print, and with --write put into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/language.md and figures/language-published/")
    options = parser.parse_args()
    table = corrected()
    print(page_table(table))
    if options.write:
        write_atomically(PAGE, fill(PAGE.read_text(), MARK, page_table(table)).encode())
        for path in save(published_curve(table), ROOT / "figures" / "language-published", "loss-and-llc"):
            print(path)


if __name__ == "__main__":
    main()
