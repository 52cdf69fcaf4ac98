"""The curves of `benchmarks.detector` have the published changes, and its rules find boundaries where they are."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.detector import INNER, RESULTS, RULES, SHAPES, ends, grids, hits, trial, turns


@pytest.mark.parametrize("shape", SHAPES)
def test_a_curve_goes_through_the_published_values(shape):
    places, values = ends()
    np.testing.assert_allclose(SHAPES[shape]()(places), values)
    assert np.ptp(SHAPES[shape]()(np.linspace(places[0], places[-1], 1001))) == pytest.approx(np.ptp(values))


def test_the_level_curve_rests_at_every_end_and_the_direct_one_only_where_it_turns():
    assert turns("level") == pytest.approx([end for _, end in INNER], rel=1e-3)
    assert turns("direct") == pytest.approx([40_000, 320_000], rel=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_with_little_noise_both_rules_find_what_is_there(rule):
    steps = grids()["the paper's"]
    errors = np.full(steps.shape, 1e-3)
    (row,) = (row for row in trial("level", steps, errors, 0) if row["rule"] == rule)
    assert all(row[stage] for stage, _ in INNER)
    (row,) = (row for row in trial("direct", steps, errors, 0) if row["rule"] == rule)
    assert [row[stage] for stage, _ in INNER] == [False, True, False, True]


def test_the_grids_are_the_shipped_one_and_the_papers():
    lengths = {name: len(steps) for name, steps in grids().items()}
    assert lengths["the paper's"] > 5 * lengths["ours"]
    assert hits(np.array([1_000.0, 2_000.0])).any(axis=1).tolist() == [True, False]


def test_the_results_are_of_these_cases():
    found = pd.read_csv(RESULTS)
    assert set(found["curve"]) == set(SHAPES)
    assert set(found["rule"]) == set(RULES)
    assert set(found["checkpoints"]) == set(grids())
