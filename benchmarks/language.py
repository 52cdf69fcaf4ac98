"""The published curve of the language model, with and without the artefact of its estimator, and the small model of data/language-quick.

    python -m benchmarks.language [--write]

Prints the changes over the published stages, the small model's behaviour and its λ̂; --write puts all into docs/language.md and draws
figures/language-published/ and figures/language-quick/.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.pages import fill, mark, markdown_table
from icl.analysis.language_stages import GAIN, language_stages
from icl.figures.development import loss_and_llc
from icl.figures.elements import StageEnds, in_order, numbers, rows_where
from icl.figures.language import PUBLISHED_STAGES, behaviour, published_curve
from icl.figures.style import save
from icl.sampling.online import artefact
from icl.sampling.presets import PRESETS
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "data" / "language-published" / "L2.csv"
PAGE = ROOT / "docs" / "language.md"
QUICK = ROOT / "data" / "language-quick" / "behaviour.csv"
QUICK_HEADS, QUICK_ESTIMATES = QUICK.with_name("heads.csv"), QUICK.with_name("estimates.csv")
QUICK_STEPS = [0, 31, 126, 695, 2086, 4869, 5565, 6608, 7999]
"""Of the checkpoints of seed 0 in data/language-quick/checkpoints."""
COMMAND = "python -m benchmarks.language --write"
MARK, QUICK_MARK, ESTIMATES_MARK = (mark(COMMAND, name) for name in ("published", "quick", "estimates"))


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
    "test/icl_wide": "in-context score", "previous_token/max": "previous token, largest head",
    "prefix_matching/max": "prefix matching, largest head", "repetition_gain": "repetition gain",
}  # fmt: skip


def quick_table(table: pd.DataFrame) -> str:
    """The behaviour of the small model at the shipped checkpoints, and the entropies of its data."""
    shown = pd.DataFrame(table[table["step"].isin(QUICK_STEPS)])
    columns = [numbers(shown, name) for name in QUICK_COLUMNS]
    rows = [
        [f"{step:,.0f}", *(f"{column[row]:.3f}" for column in columns)]
        for row, step in enumerate(numbers(shown, "step"))
    ]
    unigrams, bigrams = (numbers(shown, f"{kind}_entropy")[0] for kind in ("unigram", "bigram"))
    said = f"The entropy of the text's tokens is {unigrams:.3f} nats alone, and {bigrams:.3f} given the token before."
    return f"{markdown_table(['step', *QUICK_COLUMNS.values()], rows)}\n\n{said}"


NOTABLE = 0.1
"""Nats. The scores of 256 rows differ by up to 0.06 between neighbouring checkpoints."""


def events(run: pd.DataFrame, heads: pd.DataFrame) -> dict[str, float]:
    """What happens in a run -> the first checkpoint at which it has happened, in steps; infinite if it never does.

    Args:
        run: the behaviour of one run.
        heads: its heads.
    """
    run = in_order(run)
    steps, bigrams, context = (numbers(run, name) for name in ("step", "bigram_score", "test/icl_wide"))
    previous, prefix = numbers(run, "previous_token/max"), numbers(run, "prefix_matching/max")
    below = np.array([numbers(rows_where(heads, block=0, step=step), "previous_token").max() for step in steps])
    lowest = bigrams.argmin()
    happened = {
        "loss below the entropy of single tokens": numbers(run, "test/loss") < numbers(run, "unigram_entropy"),
        "bigram score within 0.1 nats of its minimum": bigrams < bigrams.min() + NOTABLE,
        "bigram score at its minimum": bigrams == bigrams.min(),
        "a head's previous-token score twice that of even attention": previous > 2 * previous[0],
        "the same in the first block": below > 2 * below[0],
        "in-context score 0.1 nats below that at the minimum of the bigram score": (steps > steps[lowest])
        & (context < context[lowest] - NOTABLE),
        "prefix matching twice that of even attention": prefix > 2 * prefix[0],
        "repetition gain below -0.1 nats": numbers(run, "repetition_gain") < GAIN,
    }
    return {name: float(steps[holds.argmax()]) if holds.any() else np.inf for name, holds in happened.items()}


def events_of_seeds(table: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """`events` of each `model_seed`, a column each. At step 0 attention is even."""
    return pd.DataFrame(
        {
            f"seed {seed}": events(rows_where(table, model_seed=seed), rows_where(heads, model_seed=seed))
            for seed in sorted(set(table["model_seed"]))
        }
    )


def order_table(found: pd.DataFrame) -> str:
    """`events_of_seeds` for the page."""
    rows = [
        [name, *(f"{step:,.0f}" if step < np.inf else "never" for step in steps)]
        for name, *steps in found.itertuples(name=None)
    ]
    return markdown_table(["first checkpoint with", *found.columns], rows)


def estimates_table(estimates: pd.DataFrame) -> str:
    """λ̂ along the small model for the page."""
    rows = [
        [f"{step:,.0f}", f"{llc:.1f} ± {error:.1f}", f"{init:.3f}", f"{rhat:.2f}", str(verdict)]
        for step, llc, error, init, rhat, verdict in zip(
            *(numbers(estimates, name) for name in ("step", "llc/mean", "llc/mcse", "loss/init", "llc/rhat")),
            estimates["verdict"],
            strict=True,
        )
    ]
    return markdown_table(["step", "λ̂ ± Monte-Carlo s.e.", "loss of w\\*", "R̂", "verdict"], rows)


def main() -> None:
    """Print, and with --write put into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/language.md and figures/language-published/")
    options = parser.parse_args()
    table, quick, estimates = corrected(), pd.read_csv(QUICK), pd.read_csv(QUICK_ESTIMATES)
    first, order = rows_where(quick, model_seed=0), events_of_seeds(quick, pd.read_csv(QUICK_HEADS))
    made, estimated = f"{quick_table(first)}\n\n{order_table(order)}", estimates_table(estimates)
    print(page_table(table), made, estimated, sep="\n\n")
    if options.write:
        page = fill(fill(PAGE.read_text(), MARK, page_table(table)), QUICK_MARK, made)
        page = fill(page, ESTIMATES_MARK, estimated)
        write_atomically(PAGE, page.encode())
        figures = ROOT / "figures"
        save(published_curve(table), figures / "language-published", "loss-and-llc")
        stages = StageEnds(language_stages(first), first=30)
        save(behaviour(first, stages), figures / "language-quick", "behaviour")
        save(loss_and_llc(first, estimates, stages, "test/loss"), figures / "language-quick", "loss-and-llc")


if __name__ == "__main__":
    main()
