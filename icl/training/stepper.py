"""What the training loop asks of a step.

Shapes: E members, P parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Stepper(Protocol):
    """The state of the members of a batch, and the step that advances it in place.

    Attributes:
        engine: which code computes; another one rounds differently.
        step: the number of updates done.
        block: most steps of one call of `run`.
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
        """What each member needs to go on from here, on the host."""
        ...

    def evaluate(self) -> list[Mapping[str, float]]:
        """The metrics of each member's weights."""
        ...
