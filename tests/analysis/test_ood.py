from functools import partial

import numpy as np
import pytest
import torch

from icl.analysis.ood import GAINS, effective_task_table, effective_tasks, gain_sweep
from icl.baselines import ridge_predictor, ridge_weights, zero_predictor
from icl.tasks import label

GENERATOR = torch.Generator().manual_seed(0)
XS = torch.randn(17, 5, 3, generator=GENERATOR, dtype=torch.float64)
TASKS = torch.randn(17, 3, generator=GENERATOR, dtype=torch.float64)
ERRORS = 0.3 * torch.randn(17, 5, 1, generator=GENERATOR, dtype=torch.float64)
YS = label(XS, TASKS, ERRORS)
ridge = partial(ridge_predictor, noise_variance=0.25)


def oracle(xs, ys):
    """Knows the tasks, so that its error is the noise whatever the inputs are."""
    return label(xs, TASKS, torch.zeros_like(ERRORS))


def test_an_oracle_of_the_task_fails_only_when_the_task_changes():
    table = gain_sweep(oracle, XS, TASKS, ERRORS, [0.5, 1, 3]).set_index(["version", "gain"])
    noise = float(ERRORS.square().mean())
    np.testing.assert_allclose(table.loc["inputs", "loss"], noise)
    clean = label(XS, TASKS, torch.zeros_like(ERRORS))
    for gain in (0.5, 1, 3):
        expected = float(((gain - 1) * clean + ERRORS).square().mean())
        assert table.loc[("tasks", gain), "loss"] == pytest.approx(expected)
    np.testing.assert_allclose(table.loc["inputs", "output_ratio"], [0.5, 1, 3])
    np.testing.assert_allclose(table.loc["tasks", "output_ratio"], 1)


def test_predicting_zero_grows_as_the_square():
    table = gain_sweep(zero_predictor, XS, TASKS, 0 * ERRORS, [1, 10, 100]).set_index(["version", "gain"])
    power = float(YS.sub(ERRORS).square().mean())
    np.testing.assert_allclose(table["loss_per_square"], power)


def test_both_versions_agree_at_gain_one():
    table = gain_sweep(ridge, XS, TASKS, ERRORS)
    assert len(table) == 2 * len(GAINS)
    at_one = table[np.isclose(table["gain"], 1)]
    assert at_one["loss"].nunique() == 1
    assert at_one["loss"].iloc[0] == pytest.approx(float((ridge(XS, YS) - YS).square().mean()))


def test_effective_task_of_ridge_is_its_estimate():
    torch.testing.assert_close(effective_tasks(ridge, XS, YS), ridge_weights(XS, YS, 0.25))


def test_effective_task_of_an_oracle_is_the_task():
    def knows(xs, ys):
        return label(xs, TASKS.repeat_interleave(3, dim=0), torch.zeros_like(xs[..., :1]))

    table = effective_task_table(knows, XS, YS, TASKS)
    assert table["position"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(table["cosine"], 1)
    np.testing.assert_allclose(table["relative_norm"], 1)


def test_ridge_comes_to_know_the_task():
    table = effective_task_table(ridge, XS, YS, TASKS)
    assert table["cosine"].iloc[0] == 0  # no example yet, no estimate
    assert table["cosine"].iloc[-1] > 0.9
    assert (np.diff(table["relative_norm"]) > 0).all()


def test_a_task_of_ones_own_is_scaled_by_its_own_response():
    def cube(xs, tasks):
        return label(xs, tasks, torch.zeros_like(ERRORS)) ** 3

    def knowing(xs, ys):
        return cube(xs, TASKS)

    table = gain_sweep(knowing, XS, TASKS, ERRORS, [0.5, 1, 3], response=cube).set_index(["version", "gain"])
    np.testing.assert_allclose(table.loc["inputs", "loss"], float(ERRORS.square().mean()))
    expected = float(((27 - 1) * cube(XS, TASKS) + ERRORS).square().mean())
    assert table.loc[("tasks", 3), "loss"] == pytest.approx(expected)
