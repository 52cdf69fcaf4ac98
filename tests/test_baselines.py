"""Baselines against brute-force float64 loops, their limits, causality and memory. Shapes: B batch, K examples, D
task dimension, M tasks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from icl import baselines
from icl.baselines import dmmse_predictor, dmmse_weights, ridge_predictor, ridge_weights, zero_predictor
from icl.streams import Stream


def sequences(seed: int, batch: int, examples: int, size: int, noise: float, tasks: Tensor | None = None):
    stream = Stream(seed, "test")
    w = stream.child("w").normal(0, (batch, size))
    if tasks is not None:
        w = tasks[stream.child("i").integers(0, len(tasks), (batch,))]
    xs = stream.child("x").normal(0, (batch, examples, size))
    errors = stream.child("e").normal(0, (batch, examples, 1))
    return xs, (xs * w[:, None]).sum(-1, keepdim=True) + math.sqrt(noise) * errors


def task_list(count: int, size: int) -> Tensor:
    return Stream(3, "tasks").normal(0, (count, size))


def ridge_by_loops(xs: Tensor, ys: Tensor, noise: float) -> Tensor:
    weights = torch.zeros(xs.shape, dtype=torch.float64)
    for b in range(xs.shape[0]):
        for k in range(1, xs.shape[1]):
            x, y = xs[b, :k].double(), ys[b, :k].double()
            weights[b, k] = (torch.linalg.inv(x.T @ x + noise * torch.eye(xs.shape[2]).double()) @ x.T @ y)[:, 0]
    return weights


def dmmse_by_loops(xs: Tensor, ys: Tensor, tasks: Tensor, noise: float) -> Tensor:
    weights = torch.zeros(xs.shape, dtype=torch.float64)
    x, y, w = xs.double(), ys.double(), tasks.double()
    for b in range(xs.shape[0]):
        for k in range(xs.shape[1]):
            loss = sum(((y[b, j, 0] - w @ x[b, j]) ** 2 for j in range(k)), torch.zeros(len(w)).double())
            weights[b, k] = torch.softmax(-loss / (2 * noise), dim=0) @ w
    return weights


@pytest.mark.parametrize("noise", [0.001, 0.125, 2.0])
def test_ridge_equals_the_textbook_solution(noise):
    xs, ys = sequences(0, 7, 11, 5, noise)
    expected = ridge_by_loops(xs, ys, noise)
    torch.testing.assert_close(ridge_weights(xs, ys, noise), expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ridge_predictor(xs, ys, noise)[..., 0], (expected * xs).sum(-1).float(), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("noise", [0.01, 0.125, 2.0])
@pytest.mark.parametrize("count", [1, 2, 17, 1031])
def test_dmmse_equals_the_posterior_mean(count, noise):
    tasks = task_list(count, 3)
    xs, ys = sequences(1, 5, 7, 3, noise, tasks)
    expected = dmmse_by_loops(xs, ys, tasks, noise)
    torch.testing.assert_close(dmmse_weights(xs, ys, tasks, noise), expected.float(), atol=1e-5, rtol=1e-5)
    predictions = dmmse_predictor(xs, ys, tasks, noise)[..., 0]
    torch.testing.assert_close(predictions, (expected * xs).sum(-1).float(), atol=1e-4, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 7), examples=st.integers(1, 6), size=st.integers(1, 5), count=st.integers(1, 40),
    block=st.integers(1, 300),
)  # fmt: skip
def test_dmmse_does_not_depend_on_how_it_is_blocked(batch, examples, size, count, block):
    tasks = task_list(count, size)
    xs, ys = sequences(2, batch, examples, size, 0.25, tasks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_BLOCK_ON_CPU", block)
        blocked = dmmse_weights(xs, ys, tasks, 0.25)
    torch.testing.assert_close(blocked, dmmse_by_loops(xs, ys, tasks, 0.25).float(), atol=1e-5, rtol=1e-5)


def test_many_gaussian_tasks_tend_to_ridge():
    """E over the task list of |dMMSE - ridge|² shrinks as the list grows."""
    gaps = []
    for count in (2**6, 2**10, 2**16):
        xs, ys = sequences(5, 61, 5, 2, 0.25)
        gap = dmmse_predictor(xs, ys, task_list(count, 2), 0.25) - ridge_predictor(xs, ys, 0.25)
        gaps.append(float(gap.square().mean()))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 1e-3


@pytest.mark.parametrize("noise", [0.0, 1e-10])
def test_without_noise_both_find_the_task(noise):
    tasks = task_list(101, 3)
    xs, ys = sequences(6, 13, 7, 3, 0.0, tasks)
    # Three inputs in three dimensions can be nearly dependent: only the median sequence is determined to a
    # fixed precision.
    ridge_error = (ridge_predictor(xs, ys, noise) - ys).abs()[:, 4:]
    assert float(ridge_error.median()) < 1e-5
    assert float((dmmse_predictor(xs, ys, tasks, noise) - ys).abs()[:, 2:].median()) < 1e-5


def test_ridge_without_noise_is_the_smallest_solution():
    xs, ys = sequences(7, 3, 3, 5, 0.0)
    expected = torch.linalg.pinv(xs[:, :2].double()) @ ys[:, :2].double()
    torch.testing.assert_close(ridge_weights(xs, ys, 0.0)[:, 2], expected[..., 0].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("noise", [1e-7, 1e-9, 1e-12, 1e-14, 1e-16, 1e-30])
def test_ridge_tends_to_the_smallest_solution(noise):
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(50, 6, 4, generator=generator, dtype=torch.float64)
    ys = (xs * torch.randn(50, 1, 4, generator=generator, dtype=torch.float64)).sum(-1, keepdim=True)
    limit, near = (ridge_weights(xs, ys, variance) for variance in (0.0, noise))
    # w - ŵ = σ² (XᵀX + σ²)⁻¹ w on the span of the examples
    curvature = torch.stack([torch.linalg.svdvals(xs[:, :k]).amin(-1) ** 2 for k in range(1, 6)], dim=1)
    bound = noise / curvature * limit[:, 1:].norm(dim=-1)
    assert ((near - limit)[:, 1:].norm(dim=-1) <= 1.01 * bound + 1e-6 * limit[:, 1:].norm(dim=-1)).all()


def test_first_predictions_are_the_prior_means():
    tasks = task_list(19, 3)
    xs, ys = sequences(8, 5, 2, 3, 0.5, tasks)
    assert torch.equal(ridge_predictor(xs, ys, 0.5)[:, 0], torch.zeros(5, 1))
    torch.testing.assert_close(dmmse_weights(xs, ys, tasks, 0.5)[:, 0], tasks.mean(0).expand(5, 3))
    assert torch.equal(zero_predictor(xs, ys), torch.zeros(5, 2, 1))


@pytest.mark.parametrize("name", ["ridge", "dmmse"])
def test_later_examples_never_change_earlier_predictions(name):
    tasks = task_list(23, 3)
    xs, ys = sequences(9, 5, 7, 3, 0.25, tasks)

    def predict(x: Tensor, y: Tensor) -> Tensor:
        return ridge_predictor(x, y, 0.25) if name == "ridge" else dmmse_predictor(x, y, tasks, 0.25)

    for k in range(7):
        other_x, other_y = xs.clone(), ys.clone()
        other_x[:, k + 1 :], other_y[:, k:] = 100.0, -100.0
        assert torch.equal(predict(xs, ys)[:, : k + 1], predict(other_x, other_y)[:, : k + 1])


def test_far_labels_leave_finite_weights():
    """Likelihoods that underflow in every term still have a ratio."""
    tasks = task_list(29, 3)
    xs, ys = sequences(10, 5, 5, 3, 0.01, tasks)
    weights = dmmse_weights(xs, 1e4 * ys, tasks, 0.01)
    assert torch.isfinite(weights).all()


def test_leading_axes_are_batch_axes():
    tasks = task_list(11, 3)
    xs, ys = sequences(11, 10, 5, 3, 0.25, tasks)
    folded = xs.reshape(2, 5, 5, 3), ys.reshape(2, 5, 5, 1)
    assert ridge_predictor(*folded, 0.25).shape == (2, 5, 5, 1)
    torch.testing.assert_close(ridge_predictor(*folded, 0.25).flatten(0, 1), ridge_predictor(xs, ys, 0.25))
    torch.testing.assert_close(dmmse_weights(*folded, tasks, 0.25).flatten(0, 1), dmmse_weights(xs, ys, tasks, 0.25))


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest storage that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


def test_memory_of_dmmse_does_not_grow_with_tasks():
    """At M = 2^15 and B = 1021 the array (B, M) would take 128 MiB; no tensor made on the way reaches 8 MiB."""
    tasks = task_list(2**15, 2)
    xs, ys = sequences(12, 1021, 2, 2, 0.25, tasks)
    with LargestTensor() as watch:
        dmmse_weights(xs, ys, tasks, 0.25)
    assert 0 < watch.bytes < 8 * 2**20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: ridge_predictor(x, y[:, :2], 0.1), "ys"),
        (lambda x, y: ridge_predictor(x, y, -0.1), "noise_variance"),
        (lambda x, y: ridge_predictor(x, y, math.nan), "noise_variance"),
        (lambda x, y: dmmse_predictor(x, y, torch.zeros(0, 2), 0.1), "tasks"),
        (lambda x, y: dmmse_predictor(x, y, torch.zeros(5, 3), 0.1), "tasks"),
        (lambda x, y: zero_predictor(x[:, :0], y[:, :0]), "K >= 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 5, 2), torch.zeros(3, 5, 1))
