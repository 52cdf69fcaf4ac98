"""The compiled dMMSE equals Bayes' rule in float64, whatever the number of tasks, sequences and threads."""

import math

import pytest
import torch

from icl import baselines
from icl.native.build import NativeUnavailable, find_compiler
from icl.native.dmmse import dmmse_weights
from icl.streams import Stream

try:
    find_compiler()
except NativeUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


def problem(batch: int, examples: int, task_size: int, num_tasks: int, noise_variance: float):
    """Inputs and labels divided by √2 σ, and tasks."""
    stream = Stream(3, "dmmse-test")
    tasks = stream.child("tasks").normal(0, (num_tasks, task_size))
    own = tasks[stream.child("own").integers(0, num_tasks, (batch,))]
    xs = stream.child("xs").normal(0, (batch, examples, task_size))
    ys = (xs * own[:, None]).sum(-1) + math.sqrt(noise_variance) * stream.child("noise").normal(0, (batch, examples))
    scale = 1 / math.sqrt(2 * noise_variance)
    return xs * scale, ys * scale, tasks


@pytest.mark.parametrize("num_tasks", [1, 2, 63, 64, 67, 1009])
@pytest.mark.parametrize(("batch", "examples", "task_size"), [(1, 5, 3), (37, 2, 7), (19, 1, 2)])
def test_posterior_means_are_bayes_rule(batch, examples, task_size, num_tasks):
    xs, ys, tasks = problem(batch, examples, task_size, num_tasks, 0.125)
    means = dmmse_weights(xs, ys, tasks)
    squares = (ys[..., None].double() - xs.double() @ tasks.double().T).square()
    log_likelihood = squares - squares.cumsum(1)  # minus the sum over the examples before
    expected = log_likelihood.softmax(-1) @ tasks.double()
    assert means is not None
    torch.testing.assert_close(means.double(), expected, rtol=0, atol=2e-5)


def test_tiny_noise_finds_the_task_itself():
    xs, ys, tasks = problem(23, 5, 3, 101, 1e-6)
    means = dmmse_weights(xs, ys, tasks)
    assert means is not None
    nearest = (means[:, -1, None] - tasks).norm(dim=-1).amin(dim=-1)
    assert nearest.max() < 1e-5


def test_bits_do_not_depend_on_threads():
    xs, ys, tasks = problem(131, 5, 3, 211, 0.125)
    alone, together = dmmse_weights(xs, ys, tasks, threads=1), dmmse_weights(xs, ys, tasks, threads=3)
    assert alone is not None
    assert together is not None
    assert torch.equal(alone, together)


def test_with_and_without_a_compiler_agree(monkeypatch):
    xs, ys, tasks = problem(29, 7, 3, 499, 0.5)
    compiled = baselines.dmmse_weights(xs, ys[..., None], tasks, 0.5)
    monkeypatch.setattr(baselines.native, "dmmse_weights", lambda *_: None)
    torch.testing.assert_close(compiled, baselines.dmmse_weights(xs, ys[..., None], tasks, 0.5), rtol=0, atol=2e-5)
