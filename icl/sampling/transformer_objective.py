"""The fast path: the library's own transformer under its training loss, by the compiled engine or vectorised on an accelerator.

Shapes: B batch, K examples, E chains, P sampled parameters; the losses of a batch are the K tokens'.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from icl.engine import MatmulPrecision, choose_batched, choose_path, matmul_precision, mse_loss
from icl.engine.capture import Replayed
from icl.engine.precision import TF32_EPSILON
from icl.model import InContextRegressionTransformer, TransformerShape, parameter_layout, predict, unflatten
from icl.sampling.accumulation import Accumulated, InPrecision, in_bf16
from icl.sampling.config import SamplerConfig
from icl.sampling.objective import LossFunction, ModuleObjective, Objective, kept_for_backward
from icl.sampling.restriction import Masks, restrict
from icl.sampling.units import InUnits, numbered

Batch = tuple[Tensor, Tensor]


class TransformerObjective:
    """Token losses ℓ_k = mean over the batch of (prediction_k − y_k)², and gradients of their mean or weighted sum.

    Args:
        model: at w*; not modified.
        include, exclude, mask: the coordinates that move (`icl.sampling.restriction`), by this library's or the reference code's names.
        threads: CPU threads of one call; 1 if chains are spread over workers.
        vectorise: run all chains of a call as one tensor; None: only on an accelerator.
        precision: of matrix products.

    Attributes:
        brings_threads: whether a call uses threads of its own. PyTorch should then use only one.
    """

    def __init__(
        self,
        model: InContextRegressionTransformer,
        include: Sequence[str] = ("**",),
        exclude: Sequence[str] = (),
        threads: int | None = None,
        vectorise: bool | None = None,
        mask: Masks | None = None,
        precision: MatmulPrecision = "highest",
    ) -> None:
        self._shape = model.shape
        self._precision: MatmulPrecision = precision
        flat = torch.cat([value.detach().reshape(-1) for value in model.parameters()]).clone()
        index = restrict(model, include, exclude, mask).index(parameter_layout(model.shape))
        self._index = None if index is None else index.to(flat.device)
        self._flat = flat
        self.anchor = flat if self._index is None else flat[self._index]
        self._one_by_one = flat.device.type == "cpu" if vectorise is None else not vectorise
        if precision == "tf32":
            self.resolution = TF32_EPSILON
        path = choose_path(model.shape, flat.device, threads, precision=precision)
        self._engine, self._predict = path.run, path.predict
        self.brings_threads = path.name == "native"
        self._batched = Replayed(choose_batched(model.shape, flat.device, precision)[1])

    @property
    def groups(self) -> Tensor:
        """(P,) the group of each sampled weight (`weight_groups`)."""
        return self._part(weight_groups(self._shape).to(self._flat.device))

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, K) at positions (E, P)."""
        if self._one_by_one:
            errors = (self._predict(self._full(position), *batch) - batch[1] for position in positions)
            return torch.stack([error.square().mean(dim=(-3, -1)) for error in errors])
        with torch.no_grad(), matmul_precision(self._precision, positions.device):
            return vmap(lambda position: self._token_losses(self._full(position), *batch))(positions)

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, K) and gradients (E, P) of their mean, or of their weighted sum."""
        if self._one_by_one and token_weights is None:
            pairs = [self._engine(self._full(position), *batch) for position in positions]
            return torch.stack([loss for loss, _ in pairs]), torch.stack(
                [self._part(gradient) for _, gradient in pairs]
            )
        if self._one_by_one:
            pairs = [self._vectorised(position[None], batch, token_weights) for position in positions]
            return torch.cat([loss for loss, _ in pairs]), torch.cat([gradient for _, gradient in pairs])
        return self._vectorised(positions, batch, token_weights)

    def _vectorised(self, positions: Tensor, batch: Batch, token_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = () if token_weights is None else (token_weights,)
        losses, gradients = self._batched(self._full(positions), *batch, *weights)
        return losses, self._part(gradients)

    def bytes_for_backward(self, batch: Batch) -> int:
        """Memory that `losses_and_gradients` takes for every chain of a call; 0 where chains run one after the other."""
        if self._one_by_one:
            return 0
        # It takes 2.0 to 2.8 times what a plain forward pass keeps (five sizes; tests/estimation/test_estimation.py checks the bound).
        return 3 * kept_for_backward(lambda position: self._token_losses(self._full(position), *batch), self.anchor)

    def sequence_losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, B) of the sequences, each the mean over its tokens of (prediction − y)²."""
        errors = (self._predict(self._full(position), *batch) - batch[1] for position in positions)
        return torch.stack([error.square().mean(dim=(-2, -1)) for error in errors])

    def _full(self, positions: Tensor) -> Tensor:
        """All parameters (..., P), of the sampled ones; the others are at w*."""
        if self._index is None:
            return positions
        return self._flat.expand(*positions.shape[:-1], -1).index_copy(-1, self._index, positions)

    def _part(self, gradient: Tensor) -> Tensor:
        return gradient if self._index is None else gradient[..., self._index]

    def _token_losses(self, flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        return self._errors(flat, xs, ys).square().mean(dim=(-3, -1))

    def _errors(self, flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        return predict(self._shape, unflatten(self._shape, flat), xs, ys) - ys


class SequenceLosses:
    """One loss per sequence, for the singular fluctuation of the transformer."""

    def __init__(self, objective: TransformerObjective) -> None:
        self.anchor = objective.anchor
        self.losses = objective.sequence_losses


def sampled_indices(shape: TransformerShape, include: Sequence[str], exclude: Sequence[str]) -> Tensor:
    """The indices of the sampled weights in the flat vector of all weights, ascending.

    Raises:
        ValueError: see `icl.sampling.restriction.restrict`.
    """
    model = InContextRegressionTransformer.from_shape(shape, seed=0)
    index = restrict(model, include, exclude).index(parameter_layout(shape))
    return torch.arange(shape.num_parameters) if index is None else index


def weight_groups(shape: TransformerShape) -> Tensor:
    """The group number of each weight in the flat vector.

    Each parameter tensor is one group. In attention, every head has four groups: queries, keys, values, and its columns of the output.
    """
    heads, groups = shape.num_heads, []
    for name, (offset, size) in parameter_layout(shape).items():
        index = torch.arange(offset, offset + math.prod(size)).view(size)
        if name.endswith("attention.qkv.weight"):  # rows: head, then queries, keys, values
            groups += [part.reshape(-1) for part in index.chunk(3 * heads)]
        elif name.endswith("attention.output.weight"):  # columns: head
            groups += [part.reshape(-1) for part in index.chunk(heads, dim=1)]
        else:
            groups.append(index.reshape(-1))
    return numbered(groups, shape.num_parameters)


def is_plain(model: InContextRegressionTransformer) -> bool:
    """Whether all weights move and are in full precision, and no subclass or hook changes a result, so that the engine computes the
    same."""
    whole = all(value.requires_grad and value.dtype in (torch.float32, torch.float64) for value in model.parameters())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return type(model) is InContextRegressionTransformer and whole and not hooked


def make_objective(
    model: nn.Module, loss_fn: LossFunction, config: SamplerConfig, mask: Masks | None = None
) -> Objective:
    """The objective in the configured units: the fast path if model and loss are the library's own, otherwise `ModuleObjective`."""
    objective: Any = _in_weights(model, loss_fn, config, mask)
    if config.grad_accumulation_steps > 1:
        objective = Accumulated(objective, config.grad_accumulation_steps, loss_fn)
    return InUnits(objective) if config.localization_units == "relative" else objective


def _in_weights(
    model: nn.Module, loss_fn: LossFunction, config: SamplerConfig, mask: Masks | None
) -> TransformerObjective | ModuleObjective | InPrecision:
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    whole = loss_fn is mse_loss and config.autocast is None
    if whole and isinstance(model, InContextRegressionTransformer) and is_plain(model):
        workers = min(config.cores, config.num_chains)
        threads = None if config.cores == 1 else config.cores // workers
        return TransformerObjective(
            model, config.include, config.exclude, threads, mask=mask, precision=config.matmul_precision
        )
    if config.autocast is not None:
        loss_fn = in_bf16(loss_fn, device)
    objective = ModuleObjective(model, loss_fn, config.include, config.exclude, mask=mask)
    if config.autocast is not None:
        objective.resolution = torch.finfo(torch.bfloat16).eps
    exact_by_itself = config.matmul_precision == "highest" and device.type != "cuda"
    return objective if exact_by_itself else InPrecision(objective, config.matmul_precision)
