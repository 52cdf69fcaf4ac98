"""A look at model, loss and data before any sampling, on one or two batches.

Shapes: P sampled parameters, T losses of one batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icl.sampling.objective import Batch, ModuleObjective, Objective
from icl.sampling.supply import num_samples, tensors_of

SAME = 1e-5
"""Relative difference of two evaluations that should be equal, which rounding may make."""

GRADIENT_TOLERANCE = 0.01
"""Relative difference of a gradient and the change of the loss along it."""

PART_TOLERANCE = 0.1
"""The same in a direction that is not the gradient's, in units of what an average direction has of it."""


def look_at(objective: Objective, first: Batch, second: Batch | None = None) -> None:
    """Evaluate the loss and its gradient at and near w*, and refuse what cannot be sampled.

    Args:
        first: a batch.
        second: another one, if there is.

    Raises:
        ValueError: one line that says what is wrong and what to do: a loss or gradient that is not finite, that is random, that sums
            over the samples of its batch, whose shape depends on the batch; a forward pass that changes its input; a gradient that is
            not that of the loss; whatever error the model raises by itself.
    """
    try:
        _look(objective, first, second)
    except ValueError:
        raise
    except Exception as error:  # a model may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "modified inplace" in reason or "modified by an inplace operation" in reason:
            raise ValueError(
                "the forward pass writes to its weights in place; let it compute with changed copies, or do this after training steps only"
            ) from error
        raise ValueError(f"loss_fn fails on the first batch: {type(error).__name__}: {reason[:300]}") from error


def _look(objective: Objective, first: Batch, second: Batch | None) -> None:
    anchor = objective.anchor[None]
    if not bool(torch.isfinite(anchor).all()):
        raise ValueError("a weight of the model is not finite; the estimate needs a trained model")
    before = [tensor.clone() for tensor in tensors_of(first)]
    losses, gradient = objective.losses_and_gradients(anchor, first, None)
    if any(not torch.equal(old, new) for old, new in zip(before, tensors_of(first), strict=True)):
        raise ValueError(
            "the forward pass changes its input in place; let it work on a copy, or every step meets other data"
        )
    if not bool(torch.isfinite(losses).all()):
        raise ValueError("the loss of w* is not finite; the weights given are no minimum of anything")
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            "the gradient of the loss at w* is not finite (a square root or a norm at 0?); no step can be taken"
        )
    again, gradient_again = objective.losses_and_gradients(anchor, first, None)
    if _differ(losses, again) or _differ(gradient, gradient_again):
        raise ValueError(
            "the loss is random: two evaluations at w* on one batch differ (dropout or noise?); call model.eval(), or fix the noise"
        )
    _refuse_unreached(objective, gradient, first, second)
    near = anchor + _displacement(anchor, 1.0)
    _look_at_gradient(objective, near, first)
    _look_at_scale(objective, near, first)
    if second is not None:
        shape = objective.losses(anchor, second).shape
        if shape != losses.shape:
            raise ValueError(
                f"loss_fn returned {losses.shape[1]} losses for one batch and {shape[1]} for another; return their mean, or as many "
                "losses (tokens) for every batch"
            )


def _refuse_unreached(objective: Objective, gradient: Tensor, first: Batch, second: Batch | None) -> None:
    """Refuse parameters that the loss does not reach on either batch: they would wander in the prior and tell nothing of the model."""
    unreached = getattr(objective, "unreached", None)
    if unreached is None:
        return
    names = unreached(gradient[0], first)
    if names and second is not None:
        also = set(unreached(objective.losses_and_gradients(objective.anchor[None], second, None)[1][0], second))
        names = [name for name in names if name in also]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"the loss does not reach the parameters {shown}; leave them out (exclude), freeze them with requires_grad_(False), or let "
            "loss_fn use them"
        )


def _displacement(anchor: Tensor, share: float) -> Tensor:
    """A step of this share of the weights' size, in all coordinates."""
    place = torch.arange(anchor.shape[1], device=anchor.device, dtype=torch.float32)
    return (share * (anchor.abs().mean() + 1e-3) * torch.sign(torch.sin(place * 2.399963 + 0.5))).to(anchor)


def _look_at_gradient(objective: Objective, near: Tensor, batch: Batch) -> None:
    """Compare the gradient with the change of the loss along three directions, which shows a graph that was cut or changed.

    Along the gradient, where a wrong factor shows best; in all coordinates alike, and in those alone where the gradient is 0, where a part
    that is missing does. And with the gradient that a module gets by itself.
    """
    losses, gradient = objective.losses_and_gradients(near, batch, None)
    slope = float(gradient.norm())
    if not (slope > 0 and math.isfinite(slope)):
        return
    resolution = max(torch.finfo(losses.dtype).eps, getattr(objective, "resolution", 0.0))
    if isinstance(objective, ModuleObjective):
        other = objective.gradient_of_a_copy(near[0], batch)
        if other is not None and float((gradient[0] - other).norm()) > (GRADIENT_TOLERANCE + 10 * resolution) * slope:
            raise ValueError(
                "the gradient is not that of the loss: the model reads its weights again during the backward pass, when they are no longer "
                "there. Turn activation checkpointing off"
            )
    size = float(near.double().square().mean().sqrt())
    noise = 8 * resolution * float(losses.double().abs().mean())

    def rate(direction: Tensor, distance: float) -> float:
        ahead, behind = (
            objective.losses(near + sign * distance * direction, batch).double().mean() for sign in (1, -1)
        )
        return float(ahead - behind) / (2 * distance)

    def check(direction: Tensor, distance: float, tolerance: float) -> None:
        promised = float((gradient.double() * direction).sum())
        # Weights of very different sizes may need a short distance: it is shortened while rounding allows.
        far, rounding = rate(direction, distance), noise / distance
        while True:
            distance *= 0.3
            close, more_rounding = rate(direction, distance), noise / distance
            # Two distances that agree leave no doubt about the true rate.
            doubt = 5 * abs(far - close) + rounding + more_rounding
            if abs(far - promised) <= tolerance + doubt:
                return
            if not 0 < more_rounding <= tolerance:
                raise ValueError(
                    f"the gradient is not that of the loss: in one direction the loss changes at the rate {far:.4g}, not {promised:.4g}. "
                    "Turn activation checkpointing off, detach or round nothing between the weights and the loss, and call model.eval()"
                )
            far, rounding = close, more_rounding

    check(gradient / slope, 1e-2 * size, GRADIENT_TOLERANCE * slope)
    everywhere = torch.sign(_displacement(near, 1.0))
    share = slope / math.sqrt(gradient.numel())  # of the gradient, in a direction that has nothing to do with it
    for direction in (everywhere, everywhere * (gradient == 0)):
        length = float(direction.norm())
        if length > 0:
            check(direction / length, 3e-3 * size * length, PART_TOLERANCE * share)


def _look_at_scale(objective: Objective, near: Tensor, batch: Batch) -> None:
    """Compare the loss of a batch with those of its halves, which tells a sum over samples from a mean."""
    size = num_samples(batch)
    if size < 4 or size % 2 or not _splits(batch, size):
        return
    parts = [_part(batch, slice(0, size // 2)), _part(batch, slice(size // 2, size))]
    try:
        whole = float(objective.losses(near, batch).double().mean())
        halves = [float(objective.losses(near, part).double().mean()) for part in parts]
    except Exception:
        return  # a model may want batches of one size
    mean, total = sum(halves) / 2, sum(halves)
    tolerance = 1e-3 * (abs(halves[0]) + abs(halves[1]))
    if tolerance > 0 and abs(whole - total) < tolerance < abs(whole - mean):
        raise ValueError(
            "loss_fn sums over the samples of a batch, so that a larger batch is a lower temperature; return the mean over samples "
            "(reduction='mean')"
        )


def _splits(batch: Batch, size: int) -> bool:
    return all(tensor.ndim > 0 and len(tensor) == size for tensor in tensors_of(batch))


def _part(batch: Any, chosen: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[chosen]
    if isinstance(batch, dict):
        return {key: _part(value, chosen) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return type(batch)(_part(value, chosen) for value in batch) if isinstance(batch, list | tuple) else batch
    return batch


def _differ(first: Tensor, second: Tensor) -> bool:
    scale = float(first.abs().max())
    return bool((first - second).abs().max() > SAME * scale)


def chance_level(objective: Objective, batch: Batch) -> float | None:
    """The loss of weights that know nothing of the data, or None if no such weights are worse than w*.

    These are zeros. If zeros are no worse than w*, as at a singularity in the origin, they are random weights of the norm of w*, or of norm
    1 if that is 0.
    """
    anchor = objective.anchor
    scale = float(anchor.double().square().mean().sqrt()) or 1.0
    place = torch.arange(anchor.numel(), device=anchor.device, dtype=torch.float32)
    random = [scale * 2**0.5 * torch.sin(place * 2.399963 * (1 + k) + 0.7 * k + 0.5).to(anchor) for k in range(4)]
    own = _loss(objective, anchor, batch)
    for guesses in ([torch.zeros_like(anchor)], random):
        levels = [_loss(objective, guess, batch) for guess in guesses]
        level = sum(levels) / len(levels)
        if math.isfinite(level) and level > own + SAME * abs(own):
            return level
    return None


def _loss(objective: Objective, weights: Tensor, batch: Batch) -> float:
    """The loss of weights (P,); NaN where they have none."""
    try:
        return float(objective.losses(weights[None], batch).double().mean())
    except Exception:  # a model may not bear such weights
        return math.nan
