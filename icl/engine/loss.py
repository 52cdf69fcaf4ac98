"""The training loss, and its gradient in plain PyTorch."""

from functools import partial

import torch
from torch import Tensor

from icl.baselines import Predictor
from icl.model import TransformerShape, predict, unflatten


def mse_loss(predict: Predictor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The training loss, mean over batch and examples of (ŷ - y)², in the form that `icl.sampling.estimate_llc`
    takes."""
    xs, ys = batch
    return torch.nn.functional.mse_loss(predict(xs, ys), ys)


def token_losses(predictions: Tensor, ys: Tensor) -> Tensor:
    """Mean over the batch of the squared error of each prediction: (B, K, 1), (B, K, 1) -> (K,)."""
    return (predictions - ys).square().mean(dim=(0, 2))


def loss_and_grad(shape: TransformerShape, flat: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Token losses (K,) and gradient (P,) in plain PyTorch, on any device and in any floating type."""
    with torch.enable_grad():
        parameters = _leaves(shape, flat)
        errors = predict(shape, parameters, xs, ys) - ys
        token_losses = errors.square().mean(dim=(0, 2))
        gradients = torch.autograd.grad(token_losses.mean(), list(parameters.values()))
    return token_losses.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def batched_loss_and_grad(
    shape: TransformerShape, flats: Tensor, xs: Tensor, ys: Tensor, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """E models at once, each on its own batch: flats (E, P), xs (E, B, K, D), ys (E, B, K, 1) -> (E, K), (E, P).

    A batch without the axis E, xs (B, K, D) and ys (B, K, 1), is the same for all models. The gradient is that of the mean
    of the token losses, or of their sum with `token_weights` (K,).

    This is for accelerators, where one launch for all members costs little more than for one. On a CPU, workers of one
    thread each that call `choose_path` are faster, because a step of one member already fills the caches.
    """
    with torch.enable_grad():
        parameters = _leaves(shape, flats)
        own = 0 if xs.ndim == 4 else None
        errors = torch.vmap(partial(predict, shape), in_dims=(0, own, own))(parameters, xs, ys) - ys
        token_losses = errors.square().mean(dim=(1, 3))
        driving = token_losses.mean(dim=1) if token_weights is None else token_losses @ token_weights
        # Members do not interact: the gradient of the sum holds each member's own.
        gradients = torch.autograd.grad(driving.sum(), list(parameters.values()))
    return token_losses.detach(), torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


def _leaves(shape: TransformerShape, flat: Tensor) -> dict[str, Tensor]:
    """The named parts of a flat vector (..., P) as separate variables. If they were views, the gradient of each would
    be a whole vector, mostly of zeros."""
    return {name: part.detach().requires_grad_(True) for name, part in unflatten(shape, flat).items()}
