import torch

from icl.analysis.task_prior import prior_distances, task_prior_table
from icl.baselines import zero_predictor

GENERATOR = torch.Generator().manual_seed(0)
XS = torch.randn(11, 5, 3, generator=GENERATOR)
YS = torch.randn(11, 5, 1, generator=GENERATOR)
TASKS = torch.randn(7, 3, generator=GENERATOR) + 1


def test_distances_are_sums_over_tokens_and_means_over_sequences():
    predictions = torch.randn(11, 5, 1, generator=GENERATOR)
    row = prior_distances(predictions, XS, TASKS).iloc[0]
    mean_task = TASKS.mean(dim=0)
    zero = sum(float(predictions[b, k, 0]) ** 2 for b in range(11) for k in range(5)) / 11
    mean = sum(float(predictions[b, k, 0] - mean_task @ XS[b, k]) ** 2 for b in range(11) for k in range(5)) / 11
    torch.testing.assert_close(row["task_prior/zero"], zero, rtol=1e-5, atol=0)
    torch.testing.assert_close(row["task_prior/mean_task"], mean, rtol=1e-5, atol=0)


def test_the_prior_s_own_predictors_are_at_distance_zero():
    assert task_prior_table(zero_predictor, XS, YS, TASKS)["task_prior/zero"].item() == 0
    knows_mean = task_prior_table(lambda xs, ys: xs @ TASKS.mean(dim=0)[:, None], XS, YS, TASKS).iloc[0]
    assert knows_mean["task_prior/mean_task"] < 1e-10
    assert knows_mean["task_prior/zero"] > 1


def test_gaussian_tasks_have_the_mean_zero():
    row = task_prior_table(lambda xs, ys: ys, XS, YS).iloc[0]
    assert row["task_prior/zero"] == row["task_prior/mean_task"]
