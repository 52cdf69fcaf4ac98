"""docs/language.md says what the published table and the artefact's formula give."""

import pandas as pd

from benchmarks.language import MARK, PAGE, corrected, page_table
from benchmarks.pages import END
from icl.figures.language import behaviour, published_curve


def test_the_page_is_up_to_date():
    inside = PAGE.read_text().split(MARK)[1].split(END)[0].strip()
    assert inside == page_table(corrected())


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
