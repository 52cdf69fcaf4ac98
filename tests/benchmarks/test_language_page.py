"""docs/language.md says what the published table and the artefact's formula give."""

import pandas as pd
import pytest

from benchmarks.language import (
    MARK,
    PAGE,
    QUICK,
    QUICK_MARK,
    corrected,
    order_of_stages,
    order_table,
    page_table,
    quick_table,
)
from benchmarks.pages import END
from icl.figures.language import behaviour, published_curve


def test_the_page_is_up_to_date():
    quick = pd.read_csv(QUICK)
    made = f"{quick_table(quick[quick['model_seed'] == 0])}\n\n{order_table(quick)}"
    for start, content in ((MARK, page_table(corrected())), (QUICK_MARK, made)):
        assert PAGE.read_text().split(start)[1].split(END)[0].strip() == content


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_small_model_learns_in_order(seed):
    """Unigrams, then bigrams, then attention to the previous token; no induction."""
    table = pd.read_csv(QUICK)
    table = table[table["model_seed"] == seed].set_index("step")
    assert table["test/loss"][14] < table["unigram_entropy"][14] + 0.1
    nearest = int(table["bigram_score"].idxmin())
    bigrams, previous = order_of_stages(pd.read_csv(QUICK))[seed]
    assert bigrams == nearest < previous
    assert table.loc[nearest:, "previous_token/max"].is_monotonic_increasing
    assert table["previous_token/max"][805] > 0.2
    assert table["prefix_matching/max"].max() < 0.03


def test_raw_less_corrected_is_the_artefact():
    table = corrected()
    assert ((table["llc_mean_raw"] - table["llc_corrected"]) / table["test_loss"]).dropna().round(2).eq(10.26).all()


def test_figures_show_every_curve():
    figure = published_curve(corrected())
    assert [len(axis.get_lines()) for axis in figure.axes] == [1, 2, 2]
    columns = ("test/loss", "test/loss_without_positions", "bigram_score", "unigram_entropy", "bigram_entropy", "test/icl",
               "previous_token/max", "prefix_matching/max")  # fmt: skip
    table = pd.DataFrame({"step": [0, 1, 10, 100], **{name: [1.0, 2.0, 3.0, 4.0] for name in columns}})
    assert [len(axis.get_lines()) for axis in behaviour(table).axes] == [5, 2, 2]
