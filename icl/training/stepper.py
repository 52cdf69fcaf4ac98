"""The interface of a stepper: the part of the training loop that does the steps.

Shapes: E members, P parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Stepper(Protocol):
    """The state of the members of a batch, and the step that advances it in place.

    Attributes:
        engine: name of the code that computes. Another engine rounds differently.
        step: the number of updates done.
        block: the most steps of one call of `run`.
    """

    engine: str
    step: int
    block: int

    def run(self, count: int) -> Tensor:
        """Do `count` steps; returns their batch losses (count, E) on the host."""
        ...

    def weights(self) -> Sequence[Mapping[str, Tensor]]:
        """The named weights of each member, on the host."""
        ...

    def states(self) -> list[dict[str, Tensor]]:
        """The tensors that each member needs to continue from here, on the host."""
        ...

    def evaluate(self) -> list[Mapping[str, float]]:
        """The metrics of each member's weights."""
        ...
