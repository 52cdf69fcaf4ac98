"""docs/language.md says what the published table and the artefact's formula give."""

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.language import (
    ESTIMATES_MARK,
    MARK,
    PAGE,
    QUICK,
    QUICK_ESTIMATES,
    QUICK_HEADS,
    QUICK_MARK,
    QUICK_STEPS,
    corrected,
    estimates_table,
    events_of_seeds,
    order_table,
    page_table,
    quick_table,
)
from benchmarks.pages import END
from icl.analysis.induction import previous_token_scores
from icl.analysis.language import SAMPLES
from icl.analysis.language_stages import language_stages
from icl.figures.language import attention_of_heads, behaviour, losses_on_repeats, published_curve
from icl.subjects.language_checkpoints import FolderCheckpoints, load_model

ORDER = events_of_seeds(pd.read_csv(QUICK), pd.read_csv(QUICK_HEADS))


def test_the_page_is_up_to_date():
    quick = pd.read_csv(QUICK)
    made = f"{quick_table(quick[quick['model_seed'] == 0])}\n\n{order_table(ORDER)}"
    estimated = estimates_table(pd.read_csv(QUICK_ESTIMATES))
    for start, content in ((MARK, page_table(corrected())), (QUICK_MARK, made), (ESTIMATES_MARK, estimated)):
        assert PAGE.read_text().split(start)[1].split(END)[0].strip() == content


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_small_model_learns_in_order(seed):
    """Unigrams, bigrams, attention to the previous token, then induction, with which the in-context score falls."""
    steps = ORDER[f"seed {seed}"]
    unigrams, flat, lowest, previous, first_block, context, prefix, gain = steps
    assert unigrams < flat < lowest <= previous < first_block < context < prefix <= gain < np.inf
    run = pd.read_csv(QUICK).query("model_seed == @seed").set_index("step")
    assert list(language_stages(run.reset_index())) == ["unigrams", "bigrams", "previous token", "induction"]
    first, last = run.loc[0], run.loc[7999]
    assert last["prefix_matching/max"] > 5 * first["prefix_matching/max"]
    assert last["previous_token/max"] > 5 * first["previous_token/max"]
    assert last["repetition_gain"] < -1
    assert last["test/icl_wide"] < run.loc[lowest, "test/icl_wide"] - 0.3


def test_shipped_checkpoints_give_the_rows_of_the_tables():
    """They hold half precision; the tables were made from the run itself."""
    found, shipped = FolderCheckpoints(QUICK.parent), pd.read_csv(QUICK).query("model_seed == 0").set_index("step")
    assert found.steps() == QUICK_STEPS
    assert sum(found.path(step).stat().st_size for step in QUICK_STEPS) <= 4e6
    for step in (0, QUICK_STEPS[-1]):
        model = load_model(found.path(step))
        scores = previous_token_scores(model.patterns, 1024, 1023, SAMPLES)
        assert float(scores.max()) == pytest.approx(shipped["previous_token/max"][step], rel=0.01)


def test_raw_less_corrected_is_the_artefact():
    table = corrected()
    assert ((table["llc_mean_raw"] - table["llc_corrected"]) / table["test_loss"]).dropna().round(2).eq(10.26).all()


def test_figures_show_every_curve():
    figure = published_curve(corrected())
    assert [len(axis.get_lines()) for axis in figure.axes] == [1, 2, 2]
    columns = ("test/loss", "test/loss_without_positions", "bigram_score", "unigram_entropy", "bigram_entropy",
               "test/icl_wide", "repetition_gain", "previous_token/max", "prefix_matching/max")  # fmt: skip
    table = pd.DataFrame({"step": [0, 1, 10, 100], **{name: [1.0, 2.0, 3.0, 4.0] for name in columns}})
    assert [len(axis.get_lines()) for axis in behaviour(table).axes] == [5, 3, 2]
    figure = attention_of_heads({"one": torch.eye(5), "two": torch.ones(5, 5).tril()})
    assert [len(axis.get_images()) for axis in figure.axes] == [1, 1]
    figure = losses_on_repeats({3: torch.ones(8), 70: torch.zeros(8)}, {"early": 10.0, "late": 100.0})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["step 3, early", "step 70, late"]
