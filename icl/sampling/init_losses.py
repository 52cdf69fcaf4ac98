"""L(w*) taken once, on batches of its own (`num_init_loss_batches`), and the error that this leaves in λ̂.

Shapes: C models, T losses of one batch, B batches of L(w*), N draws.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.sampling.objective import Batch, Objective

FEWEST = 8
"""The fewest batches from which the spread between batches is taken."""


@dataclass(frozen=True)
class InitLosses:
    """The losses of every w*.

    Attributes:
        mean: (C, T) means over the B batches.
        spread: (C,) standard deviation of the loss between batches.
        count: B.
    """

    mean: Tensor
    spread: Tensor
    count: int


def init_losses(
    objective: Objective,
    anchors: Tensor,
    evaluated: Callable[[int], Batch],
    count: int,
    per_pass: int | None,
    weight: Callable[[Batch], int],
) -> InitLosses:
    """The losses of w* (C, P) over the first `count` evaluation batches (index -> batch), each with its weight in the mean.

    The spread is that of at least `FEWEST` batches, or of all `per_pass` of a finite data set, if these are fewer.
    """
    total, weights, of_batches = torch.zeros(()), 0, list[Tensor]()
    distinct = math.inf if per_pass is None else per_pass
    for index in range(max(count, int(min(FEWEST, distinct)))):
        batch = evaluated(index)
        losses = objective.losses(anchors, batch).cpu().double()
        if index < distinct:
            of_batches.append(losses.mean(dim=-1))
        if index < count:
            total, weights = total + weight(batch) * losses, weights + weight(batch)
    spread = torch.stack(of_batches)
    spread = spread.std(dim=0) if len(spread) > 1 else torch.zeros_like(spread[0])  # one batch is all the data
    return InitLosses((total / weights).to(anchors), spread, count)


def unpaired_share(drawn: Iterable[int], count: int, per_pass: int | None, renewed: bool) -> float:
    r"""The standard error of mean_t ℓ(w*; b_t) − L(w*), in units of the standard deviation of ℓ(w*; b) between batches.

    Batch b has the weight a_b, its share of the draws minus its share of L(w*). The difference is Σ_b a_b ℓ(w*; b), so its variance is
    Σ a_b². In a pass over a finite data set the C batches are together the data, so that a pass contributes Σ a_b² − (Σ a_b)² / C.

    The error is common to all chains. So the spread of the chains does not show it.

    Args:
        drawn: the index of the batch of each draw; none if every chain has its own, whose noise the chains' spread does show.
        count: B; L(w*) is on the batches 0 to B − 1. 0 for the draws alone.
        per_pass: C; None for endless data.
        renewed: whether each pass has other batches. Otherwise index b + C is batch b again.
    """
    indices = torch.as_tensor(list(drawn), dtype=torch.long)
    weights = torch.bincount(indices, minlength=count).double() / max(len(indices), 1)
    weights[:count] -= 1 / max(count, 1)
    if per_pass is None:
        return float(weights.square().sum().sqrt())
    passes = torch.cat([weights, weights.new_zeros(-len(weights) % per_pass)]).reshape(-1, per_pass)
    if not renewed:
        passes = passes.sum(dim=0, keepdim=True)
    rest = passes.square().sum() - passes.sum(dim=1).square().sum() / per_pass
    return float(rest.clamp(min=0.0).sqrt())
