"""Gradient accumulation, which processes a batch in pieces to save memory, and losses in less precision.

Shapes: E chains, P sampled parameters, T losses of one batch.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from icl.engine.precision import TF32_EPSILON, MatmulPrecision, matmul_precision
from icl.sampling.objective import Batch, LossFunction, ModuleObjective, Objective
from icl.sampling.supply import num_samples, part_of


class Accumulated:
    """The losses and gradients of a batch, as weighted mean over its pieces.

    The weight of a piece is its number of samples, or `loss_fn.weight(piece)` if the loss is a mean over something else.

    Args:
        objective: the objective that is applied to each piece.
        pieces: number of pieces. A batch with fewer samples has one piece per sample.
        loss_fn: the loss function, which may have an attribute `weight`.
    """

    def __init__(self, objective: Objective, pieces: int, loss_fn: LossFunction) -> None:
        self.objective, self.anchor = objective, objective.anchor
        self._pieces = pieces
        self._weight: Callable[[Batch], Any] = getattr(loss_fn, "weight", num_samples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)  # all other attributes are those of the objective

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, T) at positions (E, P)."""
        total = None
        for share, piece in self._parts(batch):
            losses = share * self.objective.losses(positions, piece)
            total = losses if total is None else total + losses
        assert total is not None
        return total

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, T) and gradients (E, P)."""
        total = None
        for share, piece in self._parts(batch):
            losses, gradients = self.objective.losses_and_gradients(positions, piece, token_weights)
            part = share * losses, share * gradients
            total = part if total is None else (total[0] + part[0], total[1] + part[1])
        assert total is not None
        return total

    def bytes_for_backward(self, batch: Batch) -> int:
        """Memory of a backward pass: that of one piece."""
        return getattr(self.objective, "bytes_for_backward", lambda piece: 0)(next(self._parts(batch))[1])

    def _parts(self, batch: Batch) -> Iterator[tuple[float, Batch]]:
        size = num_samples(batch)
        count = min(self._pieces, size)
        edges = [size * place // count for place in range(count + 1)]
        pieces = [part_of(batch, slice(start, end), size) for start, end in pairwise(edges)]
        weights = [float(self._weight(piece)) for piece in pieces]
        for weight, piece in zip(weights, pieces, strict=True):
            yield weight / sum(weights), piece


class InPrecision:
    """An objective with its matrix products in the given precision (`icl.engine.precision`)."""

    def __init__(self, objective: ModuleObjective, precision: MatmulPrecision) -> None:
        self.objective, self.anchor = objective, objective.anchor
        self._precision: MatmulPrecision = precision
        self.resolution = max(objective.resolution, TF32_EPSILON if precision == "tf32" else 0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)  # all other attributes are those of the objective

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, T) at positions (E, P)."""
        with matmul_precision(self._precision, positions.device):
            return self.objective.losses(positions, batch)

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, T) and gradients (E, P)."""
        with matmul_precision(self._precision, positions.device):
            return self.objective.losses_and_gradients(positions, batch, token_weights, out)

    def gradient_of_a_copy(self, position: Tensor, batch: Batch) -> Tensor | None:
        """See `ModuleObjective.gradient_of_a_copy`."""
        with matmul_precision(self._precision, position.device):
            return self.objective.gradient_of_a_copy(position, batch)


def in_bf16(loss_fn: LossFunction, device: torch.device) -> LossFunction:
    """The loss function with the module run in bfloat16 by `torch.autocast`. The loss is a float32 number."""

    def loss(predict: Callable[..., Any], batch: Batch) -> Tensor:
        # No cache of cast weights, because the next chain has other weights.
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            return loss_fn(predict, batch).float()

    return loss
