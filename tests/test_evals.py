"""Metrics against plain loops, and their known values for known predictors."""

import math
from functools import partial

import pytest
import torch

from icl.baselines import ridge_predictor, zero_predictor
from icl.config import TrainingConfig
from icl.engine import mse_loss
from icl.engine.loss import token_losses
from icl.evals import ValidationSet, first_pair_ridge, icl_score, make_evaluator, validation_metrics, weight_norm
from icl.model import initial_parameters, predict
from icl.streams import Stream
from icl.tasks import RegressionTask

TASK = {
    "task_size": 3, "max_examples": 5, "noise_variance": 0.25, "embed_size": 14, "mlp_size": 11, "num_heads": 2, "num_layers": 1,
}  # fmt: skip


def config(**task) -> TrainingConfig:
    return TrainingConfig.parse({"task_config": {**TASK, **task}, "eval_batch_size": 211}).resolved()


def test_token_losses_are_means_over_the_batch():
    predictions, ys = torch.randn(7, 5, 1), torch.randn(7, 5, 1)
    for k in range(5):
        expected = sum(float(predictions[b, k, 0] - ys[b, k, 0]) ** 2 for b in range(7)) / 7
        assert float(token_losses(predictions, ys)[k]) == pytest.approx(expected, rel=1e-5)


def test_the_score_is_positive_where_later_tokens_are_better():
    assert icl_score(torch.tensor([4.0, 3.0, 1.0]), 1, 3) == pytest.approx(3.0)


def test_metrics_of_training_are_deterministic_and_consistent():
    settings = config(num_tasks=7)
    weights = initial_parameters(settings.task_config.shape, 0)
    metrics = make_evaluator(settings)(weights)
    assert metrics == make_evaluator(settings)(weights)
    for name in ("pretrain/mse", "true/mse", "pretrain/delta_ridge", "true/delta_dmmse"):
        assert metrics[name] == pytest.approx(sum(metrics[f"{name}/token/{k}"] for k in range(5)) / 5, rel=1e-5)
    assert metrics["pretrain/icl"] == pytest.approx(
        metrics["pretrain/mse/token/0"] - metrics["pretrain/mse/token/4"], rel=1e-4
    )
    assert metrics["pretrain/delta_dmmse"] != metrics["pretrain/delta_ridge"]
    assert metrics["weight/norm"] == pytest.approx(weight_norm(weights))


def test_for_gaussian_tasks_ridge_takes_the_place_of_dmmse():
    settings = config(num_tasks="inf")
    metrics = make_evaluator(settings)(initial_parameters(settings.task_config.shape, 0))
    assert metrics["pretrain/delta_dmmse"] == metrics["pretrain/delta_ridge"]


def test_the_subsequence_loss_is_the_mean_over_a_random_prefix():
    # A zero model on many sequences: each prefix mean has the expectation E[y²], so the metric estimates it too.
    settings = TrainingConfig.parse({"task_config": {**TASK, "num_tasks": "inf"}, "eval_batch_size": 20_011}).resolved()
    weights = {
        name: torch.zeros_like(value) for name, value in initial_parameters(settings.task_config.shape, 0).items()
    }
    metrics = make_evaluator(settings)(weights)
    assert metrics["true/mse_subsequence"] == pytest.approx(3.25, abs=0.2)
    assert metrics["true/mse_subsequence"] != metrics["true/mse"]


def test_known_predictors_have_their_known_losses():
    task = RegressionTask(3, 5, 0.25)
    data = ValidationSet.draw(task, size=30_011)
    zero = validation_metrics(zero_predictor, data)
    assert zero["loss/mean"] == pytest.approx(3 + 0.25, rel=0.05)
    assert zero["loss_0/mean"] == 0
    assert zero["ood_10_tasks_loss/mean"] == pytest.approx(100 * 3, rel=0.05)
    assert zero["ood_10_inputs_loss/mean"] == zero["ood_10_tasks_loss/mean"]
    ridge = validation_metrics(partial(ridge_predictor, noise_variance=0.25), data)
    assert ridge["loss/0"] == pytest.approx(zero["loss/0"])
    assert ridge["icl/1:5"] > 2
    assert ridge["loss/4"] > 0.25
    assert all(math.isfinite(value) for value in ridge.values())


def test_the_first_pair_reference_is_ridge_with_one_example():
    data = ValidationSet.draw(RegressionTask(3, 5, 0.25), size=7)
    reference = first_pair_ridge(data.xs, data.ys, 0.25)
    for b in range(7):
        x, y = data.xs[b, 0].double(), float(data.ys[b, 0, 0])
        w = torch.linalg.solve(torch.outer(x, x) + 0.25 * torch.eye(3, dtype=torch.float64), x * y)
        for k in range(5):
            assert float(reference[b, k, 0]) == pytest.approx(float(w @ data.xs[b, k].double()), abs=1e-4)
    # From the second token on it is what ridge predicts there.
    ridge = ridge_predictor(data.xs, data.ys, 0.25)
    torch.testing.assert_close(reference[:, 1], ridge[:, 1], rtol=1e-4, atol=1e-4)


def test_the_references_noise_lowers_the_loss_by_the_difference_of_variances():
    task = RegressionTask(3, 5, 0.125)
    own, theirs = ValidationSet.draw(task, size=9001), ValidationSet.draw(task, size=9001, noise_std=0.125)
    difference = (
        validation_metrics(zero_predictor, own)["loss/mean"] - validation_metrics(zero_predictor, theirs)["loss/mean"]
    )
    assert difference == pytest.approx(0.125 - 0.125**2, abs=0.02)


def test_mse_loss_is_the_training_loss():
    settings = config(num_tasks="inf")
    shape = settings.task_config.shape
    weights = initial_parameters(shape, 0)
    batch = settings.task_config.pretrain_task().sample(Stream(0, "x"), 0, 13)
    loss = mse_loss(partial(predict, shape, weights), batch)
    expected = ((predict(shape, weights, *batch) - batch[1]) ** 2).mean()
    assert float(loss) == pytest.approx(float(expected))
