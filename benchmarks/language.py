"""The published curve of the language model, with and without the artefact of its estimator, and the small model of data/language-quick.

    python -m benchmarks.language [--write]

Prints the changes over the published stages, and the small model's behaviour; --write puts both into docs/language.md and draws
figures/language-published/ and figures/language-quick/.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.pages import fill, mark, markdown_table
from icl.figures.elements import numbers, rows_where
from icl.figures.language import PUBLISHED_STAGES, behaviour, published_curve
from icl.figures.style import save
from icl.sampling.online import artefact
from icl.sampling.presets import PRESETS
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "data" / "language-published" / "L2.csv"
PAGE = ROOT / "docs" / "language.md"
QUICK = ROOT / "data" / "language-quick" / "behaviour.csv"
COMMAND = "python -m benchmarks.language --write"
MARK, QUICK_MARK = mark(COMMAND, "published"), mark(COMMAND, "quick")


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


QUICK_COLUMNS = {
    "test/loss": "test loss", "bigram_score": "bigram score", "test/loss_without_positions": "loss without positions",
    "ngram_loss/3": "loss on the third token of words", "previous_token/max": "previous token, largest head",
    "prefix_matching/max": "prefix matching, largest head",
}  # fmt: skip


def quick_table(table: pd.DataFrame) -> str:
    """The behaviour of the small model, and the entropies of its data."""
    columns = [numbers(table, name) for name in QUICK_COLUMNS]
    rows = [
        [f"{step:.0f}", *(f"{column[row]:.3f}" for column in columns)]
        for row, step in enumerate(numbers(table, "step"))
    ]
    unigrams, bigrams = (numbers(table, f"{kind}_entropy")[0] for kind in ("unigram", "bigram"))
    said = f"The entropy of the text's tokens is {unigrams:.3f} nats alone, and {bigrams:.3f} given the token before."
    return f"{markdown_table(['step', *QUICK_COLUMNS.values()], rows)}\n\n{said}"


def order_of_stages(table: pd.DataFrame) -> dict[int, tuple[int, int]]:
    """Seed -> the checkpoint nearest to the bigrams, and the first whose largest previous-token score is twice that of even attention."""
    found = {}
    for seed in sorted(set(table["model_seed"])):
        run = rows_where(table, model_seed=seed)
        steps, previous = numbers(run, "step"), numbers(run, "previous_token/max")
        above = np.flatnonzero(previous > 2 * previous[0])
        found[int(seed)] = int(steps[numbers(run, "bigram_score").argmin()]), int(steps[above[0]])
    return found


def order_table(table: pd.DataFrame) -> str:
    """`order_of_stages` for the page."""
    rows = [[str(seed), str(bigrams), str(previous)] for seed, (bigrams, previous) in order_of_stages(table).items()]
    return markdown_table(["seed", "nearest to the bigrams at step", "previous-token score doubled by step"], rows)


def main() -> None:
    """Print, and with --write put into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/language.md and figures/language-published/")
    options = parser.parse_args()
    table, quick = corrected(), pd.read_csv(QUICK)
    first = rows_where(quick, model_seed=0)
    made = f"{quick_table(first)}\n\n{order_table(quick)}"
    print(page_table(table), made, sep="\n\n")
    if options.write:
        page = fill(fill(PAGE.read_text(), MARK, page_table(table)), QUICK_MARK, made)
        write_atomically(PAGE, page.encode())
        figures = ROOT / "figures"
        save(published_curve(table), figures / "language-published", "loss-and-llc")
        save(behaviour(first), figures / "language-quick", "behaviour")


if __name__ == "__main__":
    main()
