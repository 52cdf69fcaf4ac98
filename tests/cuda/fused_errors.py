"""Prints how far the fused kernel is from float64, as JSON: `python fused_errors.py cpu|cuda`.

It is a program of its own because Triton decides at import whether its kernels are compiled or interpreted. TRITON_INTERPRET=1 asks for the
interpreter, which needs no GPU.
"""

import json
import sys

import torch
from torch import Tensor

from icl.engine import batched_loss_and_grad
from icl.engine.fused import fused_loss_and_grad
from icl.model import TransformerShape, flatten, initial_parameters, unflatten
from icl.streams import Stream

SHAPES = {
    "paper": (TransformerShape(4, 8, 64, 64, 4, 2), 8),
    "small": (TransformerShape(3, 5, 32, 16, 2, 2), 5),
    "fewer examples than places, single residual, no output map": (
        TransformerShape(3, 5, 32, 16, 2, 3, include_output=False, residual="single"), 4,
    ),
    "no norm, one block": (TransformerShape(2, 3, 16, 32, 1, 1, layer_norm=False), 3),
    "long sequences": (TransformerShape(1, 17, 16, 16, 1, 1), 17),
}  # fmt: skip


def worst(shape: TransformerShape, ours: Tensor, exact: Tensor) -> float:
    """Largest error of a gradient's parts, relative to the part's largest entry."""
    parts = zip(unflatten(shape, ours).values(), unflatten(shape, exact).values(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in parts)


def errors(shape: TransformerShape, examples: int, device: torch.device) -> dict[str, float]:
    members, batch = 2, 7  # a last tile that is not full
    stream = Stream(1, "fused")
    flats = torch.stack([flatten(initial_parameters(shape, seed)) for seed in range(members)])
    flats = flats + 0.1 * stream.child("away").normal(0, tuple(flats.shape))
    xs = stream.child("xs").normal(0, (members, batch, examples, shape.task_size))
    ys = stream.child("ys").normal(0, (members, batch, examples, 1))
    weights = torch.linspace(0, 1, examples)
    found: dict[str, float] = {}
    for name, own_xs, own_ys, own_weights in (
        ("own batches", xs, ys, None), ("one batch", xs[0], ys[0], None), ("weighted", xs, ys, weights),
    ):  # fmt: skip
        given = (flats, own_xs, own_ys, own_weights)
        here = (None if each is None else each.to(device) for each in given)
        losses, gradients = (each.cpu() for each in fused_loss_and_grad(shape, *here))
        there = (None if each is None else each.double() for each in given)
        exact_losses, exact = batched_loss_and_grad(shape, *there)
        found[f"gradient, {name}"] = worst(shape, gradients, exact)
        found[f"losses, {name}"] = float((losses / exact_losses - 1).abs().max())
    return found


if __name__ == "__main__":
    print(json.dumps({name: errors(*sizes, torch.device(sys.argv[1])) for name, sizes in SHAPES.items()}))
