"""Stages of a language model by its behaviour."""

import pandas as pd

from icl.analysis.language_stages import language_stages

TABLE = pd.DataFrame(
    {
        "step": [0, 1, 10, 100, 1000, 10_000],
        "test/loss": [6.0, 5.5, 4.8, 4.0, 3.5, 3.0],
        "unigram_entropy": 5.0,
        "bigram_score": [6.0, 5.5, 4.6, 4.1, 4.3, 4.9],
        "repetition_gain": [0.01, -0.02, 0.0, -0.01, -0.05, -0.7],
    }
)


def test_a_run_that_reaches_induction():
    expected = {"unigrams": 10, "bigrams": 100, "previous token": 10_000, "induction": 10_001}
    assert language_stages(TABLE) == expected
    assert language_stages(TABLE.iloc[::-1]) == expected


def test_a_run_that_stops_earlier_has_no_later_stages():
    assert language_stages(TABLE[:5]) == {"unigrams": 10, "bigrams": 100, "previous token": 1001}
    assert language_stages(TABLE[:4]) == {"unigrams": 10, "bigrams": 101}  # its bigram score may still fall
    assert language_stages(TABLE[:3]) == {"unigrams": 10, "bigrams": 11}
    assert language_stages(TABLE[:2]) == {"unigrams": 2}


def test_stages_that_come_in_another_order_do_not_overlap():
    early = TABLE.assign(repetition_gain=[0.01, -0.02, -0.5, -0.6, -0.7, -0.7])  # induction before the best bigrams
    ends = list(language_stages(early).values())
    assert ends == sorted(set(ends))
    assert ends[-1] == 10_001
