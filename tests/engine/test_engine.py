"""The engine's paths compute one function: the textbook loss and its gradient, in any size."""

import math
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from icl.engine import choose_path, loss_and_grad
from icl.model import (
    TransformerShape,
    flatten,
    initial_parameters,
    parameter_layout,
    predict_with_activations,
    unflatten,
)
from icl.native.build import NativeUnavailable, find_compiler
from icl.streams import Stream

PAPER = TransformerShape(task_size=4, max_examples=8, embed_size=64, mlp_size=64, num_heads=4, num_layers=2)
PRIME = TransformerShape(task_size=3, max_examples=5, embed_size=14, mlp_size=23, num_heads=2, num_layers=2)
BARE = TransformerShape(7, 5, 33, 19, 3, 1, layer_norm=False, include_output=False, residual="single")
DEEP = TransformerShape(2, 11, 26, 51, 13, 3, include_output=False)
ONE_EXAMPLE = TransformerShape(5, 1, 15, 7, 5, 2, residual="single")
SHAPES = pytest.mark.parametrize(
    "shape", [PAPER, PRIME, BARE, DEEP, ONE_EXAMPLE], ids=["paper", "prime", "bare", "deep", "one"]
)


def has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except NativeUnavailable:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="the native kernel needs a C++ compiler")


def problem(shape: TransformerShape, batch: int, examples: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters away from their initial values (norm gains and biases too), and a batch."""
    stream = Stream(seed, "engine-test")
    flat = flatten(initial_parameters(shape, seed)) + 0.1 * stream.child("parameters").normal(
        0, (shape.num_parameters,)
    )
    xs = stream.child("xs").normal(0, (batch, examples, shape.task_size))
    return flat, xs, stream.child("ys").normal(0, (batch, examples, 1))


def textbook(shape: TransformerShape, flat: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """The untrimmed model, in float64, with its own autograd."""
    flat = flat.double().requires_grad_(True)
    predictions, _ = predict_with_activations(shape, unflatten(shape, flat), xs.double(), ys.double())
    token_losses = (predictions - ys.double()).square().mean(dim=(0, 2))
    token_losses.mean().backward()
    assert flat.grad is not None
    return token_losses.detach(), flat.grad


UNIT = 2.0**-24
"""Unit roundoff of float32."""
STABLE = 16
"""Rounding errors of so many times what rounding the inputs does are those of a backward-stable algorithm. Over twelve
problems of each shape and batch below, the largest ratio was 6 for the kernel and 8 for PyTorch."""


def perturbed(value: Tensor, purpose: str, draw: int) -> Tensor:
    """Every number moved by a relative amount, uniform within the unit roundoff."""
    return value * (1 + UNIT * (2 * Stream(draw, f"engine-test/{purpose}").uniform(0, value.shape).double() - 1))


@dataclass(frozen=True)
class Conditioned:
    """The exact losses and gradient of a problem (float64), and how far they move when its inputs are rounded.

    An algorithm is backward stable if what it computes is the exact answer to a problem whose inputs differ by a few
    roundings. `loss_scale` and `scales` (per parameter) are the largest movements, over entries and over eight random
    perturbations of parameters and data by at most one unit roundoff: condition numbers times roundoff, whatever
    cancels in the gradient. All in float64, so that the yardstick is the same on every machine.
    """

    shape: TransformerShape
    losses: Tensor
    gradient: Tensor
    loss_scale: float
    scales: dict[str, float]

    @classmethod
    def of(cls, shape: TransformerShape, flat: Tensor, xs: Tensor, ys: Tensor) -> "Conditioned":
        losses, gradient = textbook(shape, flat, xs, ys)
        loss_scale, scales = 0.0, dict.fromkeys(parameter_layout(shape), 0.0)
        for draw in range(8):
            inputs = [perturbed(each.double(), name, draw) for name, each in (("w", flat), ("xs", xs), ("ys", ys))]
            moved_losses, moved_gradient = textbook(shape, *inputs)
            loss_scale = max(loss_scale, float((moved_losses - losses).abs().max()))
            for name, part in unflatten(shape, moved_gradient - gradient).items():
                scales[name] = max(scales[name], float(part.abs().max()))
        return cls(shape, losses, gradient, loss_scale, scales)

    def faults(self, losses: Tensor, gradient: Tensor) -> list[str]:
        """What is farther from exact than a backward-stable algorithm would leave it; where exact is zero, so must be
        the other."""
        found = ["losses"] if (losses - self.losses).abs().max() > STABLE * self.loss_scale else []
        for name, exact in unflatten(self.shape, self.gradient).items():
            part = unflatten(self.shape, gradient)[name]
            right = (part - exact).abs().max() <= STABLE * self.scales[name] and bool((part[exact == 0] == 0).all())
            found += [] if right else [name]
        return found


@SHAPES
def test_reference_equals_the_untrimmed_model(shape):
    flat, xs, ys = (tensor.double() for tensor in problem(shape, 7, shape.max_examples))
    losses, gradient = loss_and_grad(shape, flat, xs, ys)
    exact_losses, exact_gradient = textbook(shape, flat, xs, ys)
    torch.testing.assert_close(losses, exact_losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-10, atol=1e-12)


@needs_compiler
@SHAPES
@pytest.mark.parametrize("batch", [1, 19])
def test_native_equals_float64_to_rounding(shape, batch):
    run = choose_path(shape, native="require", threads=1).run
    for examples in {shape.max_examples, (shape.max_examples + 1) // 2}:
        inputs = problem(shape, batch, examples)
        assert Conditioned.of(shape, *inputs).faults(*run(*inputs)) == []


@SHAPES
@pytest.mark.parametrize("batch", [1, 19])
def test_a_factor_wrong_by_a_thousandth_in_any_one_parameter_is_more_than_rounding(shape, batch):
    inputs = problem(shape, batch, shape.max_examples)
    exact = Conditioned.of(shape, *inputs)
    assert exact.faults(exact.losses, exact.gradient) == []
    assert exact.faults(exact.losses * 1.001, exact.gradient) == ["losses"]
    for name, (offset, size) in parameter_layout(shape).items():
        wrong = exact.gradient.clone()
        wrong[offset : offset + math.prod(size)] *= 1.001
        assert exact.faults(exact.losses, wrong) == [name]


@needs_compiler
def test_native_at_the_training_batch_is_within_1e_6_of_float64():
    inputs = problem(PAPER, 256, 8)
    losses, gradient = choose_path(PAPER, native="require", threads=1).run(*inputs)
    exact_losses, exact_gradient = textbook(PAPER, *inputs)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-6, atol=0)
    for name, exact in unflatten(PAPER, exact_gradient).items():
        assert (unflatten(PAPER, gradient)[name] - exact).abs().max() <= 1e-6 * exact.abs().max(), name


@SHAPES
@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("native", [pytest.param("require", marks=needs_compiler), "never"])
def test_predictions_equal_float64_to_rounding(shape, batch, native):
    def exact(flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        return predict_with_activations(shape, unflatten(shape, flat.double()), xs.double(), ys.double())[0]

    for examples in {shape.max_examples, (shape.max_examples + 1) // 2}:
        inputs = problem(shape, batch, examples)
        names = ("w", "xs", "ys")
        moved = [
            exact(*(perturbed(each.double(), name, draw) for name, each in zip(names, inputs, strict=True)))
            for draw in range(8)
        ]
        rounding = max(float((each - exact(*inputs)).abs().max()) for each in moved)
        predictions = choose_path(shape, threads=2, native=native).predict(*inputs)
        assert predictions.shape == (batch, examples, 1)
        assert float((predictions - exact(*inputs)).abs().max()) <= STABLE * rounding


@needs_compiler
@pytest.mark.parametrize("batch", [3, 131, 257])
def test_bits_do_not_depend_on_threads(batch):
    flat, xs, ys = problem(PRIME, batch, 5)
    alone = choose_path(PRIME, native="require", threads=1).run(flat, xs, ys)
    for threads in (2, 3, 11):
        together = choose_path(PRIME, native="require", threads=threads).run(flat, xs, ys)
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1])


@needs_compiler
def test_one_callable_serves_several_python_threads():
    run = choose_path(PRIME, native="require", threads=1).run
    problems = [problem(PRIME, 61, 5, seed) for seed in range(4)]
    alone = [run(*each)[1] for each in problems]
    together: list[Tensor] = [torch.empty(0)] * len(problems)

    def work(index: int) -> None:
        for _ in range(5):
            together[index] = run(*problems[index])[1]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@needs_compiler
def test_batch_of_copies_has_the_loss_and_gradient_of_one():
    flat, xs, ys = problem(PRIME, 1, 5)
    run = choose_path(PRIME, native="require", threads=1).run
    one, many = run(flat, xs, ys), run(flat, xs.expand(37, -1, -1), ys.expand(37, -1, -1))
    torch.testing.assert_close(one[0], many[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one[1], many[1], rtol=1e-4, atol=1e-6)


@needs_compiler
def test_gradient_is_the_slope_of_the_loss():
    flat, xs, ys = problem(PRIME, 17, 5)
    run = choose_path(PRIME, native="require", threads=1).run
    _, gradient = run(flat, xs, ys)
    direction = gradient / gradient.norm()
    step = 1e-2
    slope = (run(flat + step * direction, xs, ys)[0].mean() - run(flat - step * direction, xs, ys)[0].mean()) / (
        2 * step
    )
    torch.testing.assert_close(slope, gradient.norm(), rtol=1e-2, atol=0)


@needs_compiler
def test_unused_parameters_have_zero_gradient():
    flat, xs, ys = problem(PAPER, 5, 3)
    gradient = unflatten(PAPER, choose_path(PAPER, native="require").run(flat, xs, ys)[1])
    assert (gradient["position_embedding.weight"][:, 5:] == 0).all()
    assert (gradient["position_embedding.weight"][:, :5] != 0).any(dim=0).all()
    assert (gradient["unembedding.weight"][1:] == 0).all()
    assert (gradient["unembedding.bias"][1:] == 0).all()


@needs_compiler
def test_nan_is_passed_on():
    flat, xs, ys = problem(PRIME, 3, 5)
    ys[1, 2] = float("nan")
    losses, gradient = choose_path(PRIME, native="require").run(flat, xs, ys)
    assert losses.isnan().any()
    assert gradient.isnan().any()


@needs_compiler
def test_wrong_shapes_are_refused():
    flat, xs, ys = problem(PRIME, 3, 5)
    run = choose_path(PRIME, native="require").run
    for wrong in [(flat[:-1], xs, ys), (flat, xs[..., :2], ys), (flat, xs, ys[:, :2]), (flat, xs[:0], ys[:0])]:
        with pytest.raises(ValueError, match="expected flat"):
            run(*wrong)


def test_float64_goes_through_the_reference():
    flat, xs, ys = (tensor.double() for tensor in problem(PRIME, 3, 5))
    for ours, exact in zip(choose_path(PRIME).run(flat, xs, ys), textbook(PRIME, flat, xs, ys), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_without_a_compiler_the_reference_takes_over_and_says_so(monkeypatch, tmp_path):
    shape = TransformerShape(2, 3, 6, 5, 1, 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    path = choose_path(shape)
    assert path.name == "torch"
    assert "no C++ compiler" in path.reason
    assert "\n" not in path.reason
    flat, xs, ys = problem(shape, 3, 3)
    assert torch.equal(path.run(flat, xs, ys)[1], loss_and_grad(shape, flat, xs, ys)[1])
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        choose_path(shape, native="require")


def test_native_can_be_turned_off(monkeypatch):
    assert choose_path(PRIME, native="never").name == "torch"
    monkeypatch.setenv("ICL_NATIVE", "0")
    assert choose_path(PRIME).reason == "turned off by ICL_NATIVE=0"


@pytest.mark.parametrize("wide", [{"embed_size": 512}, {"mlp_size": 1024}], ids=str)
def test_wide_models_use_torch_by_themselves(wide):
    path = choose_path(replace(PAPER, **wide))
    assert path.name == "torch"
    assert "width of 512" in path.reason


def test_other_devices_use_torch():
    assert choose_path(PRIME, "meta").name == "torch"


def test_layout_is_the_order_of_the_flat_vector():
    offsets = [offset for offset, _ in parameter_layout(PRIME).values()]
    assert offsets == sorted(offsets)
