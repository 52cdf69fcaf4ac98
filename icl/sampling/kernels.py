"""The sampling kernels by name. A new kernel is a module like `icl.sampling.sgld`, and a line here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from icl.sampling import langevin, rmsprop_sgld, sgld, sgnht


@dataclass(frozen=True)
class Kernel:
    """One sampler.

    Attributes:
        constants: the record of its constants, a subclass of `icl.sampling.sgld.SGLDConfig`.
        init: (constants, w*, ε, noise) -> the state of chains that start at w*.
        step: (constants, state, gradient, noise) -> the state after one update.
        temperature: state -> kinetic temperature (E,), which is 1 for chains that sample the target; None for a kernel without momentum.
        step_in_place: the same as `step` within the state's own tensors, false if it cannot be done so; None: never.
        elementwise: whether the update of a coordinate needs no other coordinate, so that a chain can be stepped piece by piece.
        settings: constant -> name of its own setting in `SamplerConfig`.
    """

    constants: type[sgld.SGLDConfig]
    init: Callable[[Any, Tensor, Tensor, Tensor], Any]
    step: Callable[[Any, Any, Tensor, Tensor], Any]
    settings: Mapping[str, str] = field(default_factory=dict)
    temperature: Callable[[Any], Tensor] | None = None
    elementwise: bool = True
    step_in_place: Callable[[Any, Any, Tensor, Tensor], bool] | None = None

    @property
    def own_constants(self) -> set[str]:
        """The names of the constants that SGLD does not have."""
        return {each.name for each in fields(self.constants)} - {each.name for each in fields(sgld.SGLDConfig)}


KERNELS: Mapping[str, Kernel] = {
    "sgld": Kernel(sgld.SGLDConfig, sgld.init, sgld.step),
    "langevin": Kernel(
        langevin.LangevinConfig,
        langevin.init,
        langevin.step,
        {"friction": "friction"},
        langevin.temperature,
        step_in_place=langevin.step_in_place,
    ),
    "rmsprop_sgld": Kernel(
        rmsprop_sgld.RMSPropSGLDConfig,
        rmsprop_sgld.init,
        rmsprop_sgld.step,
        {"decay": "rmsprop_decay", "stability": "rmsprop_stability"},
    ),
    "sgnht": Kernel(
        sgnht.SGNHTConfig, sgnht.init, sgnht.step, {"diffusion": "diffusion_factor"}, sgnht.temperature, False
    ),
}
