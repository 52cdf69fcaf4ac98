r"""Localisation relative to the weights: each group of weights is measured in units of its own size.

In absolute units a Gaussian holds a chain near w*, and its width is the same for small and large weights. Weights grow during training. A
layer norm makes the model independent of the scale of the weights that write to its input. So the same γ has a different meaning at
different checkpoints. In relative units the target is

    p(w) ∝ exp( −nβ L(w) − (γ/2) Σ_g ‖w_g − w*_g‖² / s_g² ),      s_g = root mean square of w*_g,

so that 1/√γ is the width as a share of the weights of each group g. With u_g = w_g / s_g this is the usual target in u, and
the sampler's step is ε s_g² in w_g.

**What is invariant.** Suppose that multiplying the groups by numbers c_g does not change the model's function. Then L(s u) is the same
function of u before and after. So every chain is the same, and λ̂ is equal up to rounding. In the library's transformer this holds for
the following changes, apart from the layer norm's own ε of 1e-5:

- all that writes to the residual stream, times c: embeddings, attention output, the MLP's second layer with its bias;
- a layer norm's weight and bias times c, and 1/c on each map that reads it;
- one head's queries times c and its keys divided by c; its values times c and its columns of the output divided by c;
- the MLP's first layer with its bias times c, and 1/c on its second layer's weight.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from icl.sampling.objective import Batch, Objective
from icl.sampling.plan import Recorder

SAME_IN_ALL_UNITS = ("groups", "resolution", "brings_threads", "bytes_for_backward", "unreached")
"""Optional attributes of an objective that do not depend on the units of its weights."""


class Grouped(Objective, Protocol):
    """An objective whose weights come in groups."""

    @property
    def groups(self) -> Tensor:
        """(P,) the number of each sampled weight's group, 0, 1, ..."""
        ...


class InUnits:
    """An objective as a function of u = w / s.

    Args:
        objective: the loss as a function of w.

    Attributes:
        objective: the argument.
        units: s (P,).
    """

    def __init__(self, objective: Grouped) -> None:
        self.objective = objective
        self.units = units_of(objective.anchor, objective.groups)
        self.anchor = objective.anchor / self.units

    def __getattr__(self, name: str) -> object:
        # Other attributes are refused, because a method that takes weights w would get u.
        if name not in SAME_IN_ALL_UNITS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.objective, name)

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, T) at positions u (E, P)."""
        return self.objective.losses(positions * self.units, batch)

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, T) and gradients (E, P) with respect to u."""
        losses, gradients = self.objective.losses_and_gradients(positions * self.units, batch, token_weights)
        return losses, gradients * self.units

    def of_weights(self, recorder: Recorder) -> Recorder:
        """A recorder of weights w as one of positions u."""
        return lambda draw, positions, chains: recorder(draw, positions * self.units, chains)


def in_weights(objective: Objective) -> Objective:
    """The loss as a function of the weights w themselves, in whatever units the chains move."""
    return objective.objective if isinstance(objective, InUnits) else objective


def units_of(weights: Tensor, groups: Tensor) -> Tensor:
    """s (P,): the root mean square of each group's weights; a group of zeros has that of all weights.

    Args:
        weights: (P,).
        groups: (P,) the number of each weight's group, 0, 1, ...

    Raises:
        ValueError: all weights are zero.
    """
    whole = weights.square().mean().sqrt()
    if not whole > 0:
        raise ValueError(
            "all weights are zero, so nothing can be measured in units of them; use localization_units: absolute"
        )
    groups = groups.to(weights.device)
    squares = weights.new_zeros(int(groups.max()) + 1).index_add(0, groups, weights.square())
    sizes = (squares / torch.bincount(groups).clamp(min=1)).sqrt()
    return torch.where(sizes > 0, sizes, whole)[groups]


def numbered(pieces: Iterable[Tensor], total: int) -> Tensor:
    """(total,) the number of each weight's group, from groups as index vectors."""
    groups = torch.empty(total, dtype=torch.long)
    for number, piece in enumerate(pieces):
        groups[piece] = number
    return groups
