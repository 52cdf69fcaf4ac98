"""Task distributions and tokens."""

import math

import pytest
import torch

from icl.streams import Stream
from icl.tasks import RegressionTask, encode_tokens, label, zero_predictor_loss

D, K, B = 3, 5, 7


def test_a_batch_is_a_pure_function_of_seed_and_step():
    task = RegressionTask(D, K, 0.25)
    first, again = (task.sample(Stream(1, "data"), 4, B) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = task.sample(Stream(1, "data"), 5, B)
    assert not torch.equal(first[0], other[0])


def test_a_smaller_batch_is_the_beginning_of_a_larger_one():
    task = RegressionTask(D, K, 0.25, num_tasks=11)
    small, large = task.sample(Stream(1, "data"), 4, B), task.sample(Stream(1, "data"), 4, 2 * B)
    assert all(torch.equal(a, b[:B]) for a, b in zip(small, large, strict=True))


def test_task_sets_are_nested():
    small, large = (RegressionTask(D, K, 0.25, num_tasks=m, task_seed=9).tasks for m in (13, 64))
    assert small.shape == (13, D)
    assert torch.equal(small, large[:13])


def test_labels_follow_the_formula():
    xs, tasks, errors = torch.randn(B, K, D), torch.randn(B, D), torch.randn(B, K, 1)
    ys = label(xs, tasks, errors)
    for b in range(B):
        for k in range(K):
            expected = sum(float(xs[b, k, d] * tasks[b, d]) for d in range(D)) + float(errors[b, k, 0])
            assert float(ys[b, k, 0]) == pytest.approx(expected, abs=1e-5)


def test_noise_has_the_stated_variance():
    variance = 0.125
    _, ys = RegressionTask(D, K, variance).sequences(torch.zeros(20_011, D), Stream(0, "noise"), 0)
    n = ys.numel()
    assert abs(float(ys.mean())) < 4 * math.sqrt(variance / n)
    assert abs(float((ys**2).mean()) - variance) < 4 * variance * math.sqrt(2 / n)


def test_discrete_tasks_come_from_the_list_uniformly():
    task = RegressionTask(D, K, 0.0, num_tasks=5)
    tasks = task.sample_tasks(Stream(0, "x"), 0, 5_003)
    index = (tasks[:, None, :] == task.tasks[None]).all(dim=-1)
    assert bool((index.sum(dim=1) == 1).all())
    counts = index.sum(dim=0).double()
    assert float(((counts - 5_003 / 5) ** 2 / (5_003 / 5)).sum()) < 18.5  # 99.9 % of chi² at 4 degrees of freedom


def test_gaussian_tasks_have_unit_covariance():
    tasks = RegressionTask(D, K, 0.0).sample_tasks(Stream(0, "x"), 0, 40_009).double()
    covariance = tasks.T @ tasks / len(tasks)
    assert float((covariance - torch.eye(D)).abs().max()) < 5 * math.sqrt(2 / len(tasks))


def test_tokens_interleave_inputs_and_labels():
    xs, ys = torch.randn(B, K, D), torch.randn(B, K, 1)
    tokens = encode_tokens(xs, ys)
    assert tokens.shape == (B, 2 * K, D + 1)
    assert torch.equal(tokens[2, 4], torch.cat((torch.zeros(1), xs[2, 2])))
    assert torch.equal(tokens[2, 5], torch.cat((ys[2, 2], torch.zeros(D))))
    assert torch.equal(tokens[:, 0::2, 1:], xs)
    assert torch.equal(tokens[:, 1::2, :1], ys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_size": 0}, "task_size"),
        ({"max_examples": 0}, "max_examples"),
        ({"noise_variance": -1.0}, "noise_variance"),
        ({"noise_variance": math.nan}, "noise_variance"),
        ({"num_tasks": 0}, "num_tasks"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegressionTask(**{"task_size": D, "max_examples": K, "noise_variance": 0.1, **arguments})


def test_gaussian_tasks_have_no_list():
    with pytest.raises(ValueError, match="no task list"):
        _ = RegressionTask(D, K, 0.1).tasks


class Flat(RegressionTask):
    """Answers that are ten times as small."""

    def response(self, xs, tasks):
        return 0.1 * super().response(xs, tasks)


@pytest.mark.parametrize("num_tasks", [None, 5])
def test_the_loss_of_predicting_zero_is_that_of_the_tasks_own_labels(num_tasks):
    law, flat = (kind(4, 8, 0.01, num_tasks) for kind in (RegressionTask, Flat))
    _, ys = law.sample(Stream(7, "test"), 0, 20_000)
    assert zero_predictor_loss(law) == pytest.approx(float(ys.square().mean()), rel=0.03)
    expected = 0.01 * (zero_predictor_loss(law) - 0.01) + 0.01
    assert zero_predictor_loss(flat) == pytest.approx(expected, rel=0.05)
