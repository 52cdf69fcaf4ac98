"""Checks of model, loss and data on one or two batches, before any sampling.

Shapes: P sampled parameters, T losses of one batch.
"""

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from icl.sampling.accumulation import InPrecision
from icl.sampling.objective import WRITTEN, Batch, ModuleObjective, Objective
from icl.sampling.supply import num_samples, part_of, tensors_of

SAME = 1e-5
"""Largest relative difference of two evaluations that should be equal up to rounding."""

GRADIENT_TOLERANCE = 0.01
"""Largest relative difference between a gradient and the change of the loss along it."""

PART_TOLERANCE = 0.1
"""The same in a direction other than the gradient's, in units of the gradient's typical component."""


def look_at(objective: Objective, first: Batch, second: Batch | None = None) -> None:
    """Evaluate the loss and its gradient at and near w*, and refuse what cannot be sampled.

    Args:
        objective: the loss.
        first: a batch.
        second: another batch, if there is one.

    Raises:
        ValueError: the loss or the gradient is not finite or is random; the loss is a sum over the samples of its batch, or its shape
            depends on the batch; the forward pass changes its input; the gradient is not that of the loss; or the model raises any
            error. The message is one line with the fault and what to do.
    """
    try:
        _look(objective, first, second)
    except ValueError:
        raise
    except Exception as error:  # a model may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "modified inplace" in reason or "modified by an inplace operation" in reason:
            raise ValueError(WRITTEN) from error
        raise ValueError(f"loss_fn fails on the first batch: {type(error).__name__}: {reason[:300]}") from error


def _look(objective: Objective, first: Batch, second: Batch | None) -> None:
    anchor = objective.anchor[None]
    if not bool(torch.isfinite(anchor).all()):
        raise ValueError("a weight of the model is not finite; the estimate needs a trained model")
    before = [tensor.clone() for tensor in tensors_of(first)]
    losses, gradient = objective.losses_and_gradients(anchor, first, None)
    if any(not _equal(old, new) for old, new in zip(before, tensors_of(first), strict=True)):
        raise ValueError(
            "the forward pass changes its input in place, so every step would see other data; let it work on a copy"
        )
    if not bool(torch.isfinite(losses).all()):
        raise ValueError("the loss of w* is not finite; give weights of a trained model")
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            "the gradient of the loss at w* is not finite (a square root or a norm at 0?); mend the loss or the model"
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
    """Refuse parameters on which the loss does not depend on either batch. They would only follow the prior."""
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
    """A displacement in all coordinates, by this fraction of the weights' mean size."""
    place = torch.arange(anchor.shape[1], device=anchor.device, dtype=torch.float32)
    return (share * (anchor.abs().mean() + 1e-3) * torch.sign(torch.sin(place * 2.399963 + 0.5))).to(anchor)


def _look_at_gradient(objective: Objective, near: Tensor, batch: Batch) -> None:
    """Compare the gradient with the change of the loss along three directions. A difference means that the graph was cut or changed.

    The first direction is the gradient, which shows a wrong factor. The second has all coordinates, and the third only those with gradient
    0; they show missing parts. For a module, the gradient is also compared with that of the module's own backward pass.
    """
    losses, gradient = objective.losses_and_gradients(near, batch, None)
    slope = float(gradient.norm())
    if not (slope > 0 and math.isfinite(slope)):
        return
    resolution = max(torch.finfo(losses.dtype).eps, getattr(objective, "resolution", 0.0))
    if isinstance(objective, ModuleObjective | InPrecision):
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
        # Weights of very different sizes may need a short distance, so it is shortened as far as rounding allows.
        far, rounding = rate(direction, distance), noise / distance
        while True:
            distance *= 0.3
            close, more_rounding = rate(direction, distance), noise / distance
            # If two distances agree, the rate is certain.
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
    share = slope / math.sqrt(gradient.numel())  # the gradient's typical component in an unrelated direction
    for direction in (everywhere, everywhere * (gradient == 0)):
        length = float(direction.norm())
        if length > 0:
            check(direction / length, 3e-3 * size * length, PART_TOLERANCE * share)


def _look_at_scale(objective: Objective, near: Tensor, batch: Batch) -> None:
    """Compare the loss of some samples with that of the same samples twice, to tell a sum over samples from a mean.

    A mean stays, also one that weights its samples or leaves some out. A sum doubles.
    """
    size = num_samples(batch)
    some = torch.arange((size + 1) // 2)
    try:
        once, twice = (
            float(objective.losses(near, part_of(batch, chosen, size)).double().mean())
            for chosen in (some, some.repeat(2))
        )
    except Exception:
        return  # a model may want batches of one size
    tolerance = 1e-3 * abs(once)
    if tolerance > 0 and abs(twice - 2 * once) < tolerance:
        raise ValueError(
            "loss_fn sums over the samples of a batch, so a larger batch would mean a lower temperature; return the mean over samples "
            "(reduction='mean')"
        )


def _equal(old: Tensor, new: Tensor) -> bool:
    """Whether all numbers are the same; NaN, which may stand for a missing label, is equal to NaN."""
    if old.layout != torch.strided:  # such as sparse, which has no comparison of entries
        return True
    return old.shape == new.shape and bool(((old == new) | ((old != old) & (new != new))).all())


def _differ(first: Tensor, second: Tensor) -> bool:
    scale = float(first.abs().max())
    return bool((first - second).abs().max() > SAME * scale)


def worth_of_w_star(objective: Objective, batches: Sequence[Batch]) -> float | None:
    """How much larger the mean loss of uninformed weights is than that of w*, over some batches; None if it is not larger.

    Uninformed weights are zeros. If zeros are not worse than w*, as at a singularity in the origin, they are random weights with the norm
    of w*, or of size 1 if that is 0.
    """
    anchor = objective.anchor
    scale = float(anchor.double().square().mean().sqrt()) or 1.0
    place = torch.arange(anchor.numel(), device=anchor.device, dtype=torch.float32)
    random = [scale * 2**0.5 * torch.sin(place * 2.399963 * (1 + k) + 0.7 * k + 0.5).to(anchor) for k in range(4)]
    own = _loss(objective, anchor, batches)
    for guesses in ([torch.zeros_like(anchor)], random):
        levels = [_loss(objective, guess, batches) for guess in guesses]
        level = sum(levels) / len(levels)
        if math.isfinite(level) and level > own + SAME * abs(own):
            return level - own
    return None


def _loss(objective: Objective, weights: Tensor, batches: Sequence[Batch]) -> float:
    """The mean loss at weights (P,); NaN if the model cannot be run there."""
    try:
        return fmean(float(objective.losses(weights[None], batch).double().mean()) for batch in batches)
    except Exception:  # a model may fail at such weights
        return math.nan
