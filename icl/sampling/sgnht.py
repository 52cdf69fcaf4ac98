r"""The stochastic gradient Nosé-Hoover thermostat (Ding et al., NeurIPS 2014, algorithm 2), with localisation.

In units of the momentum's step (v = √ε p), with D the diffusion factor and P the number of parameters,

    v ← (1 − ξ) (v − ε ∇U(w)) + √(2 D ε) s z,     z ~ N(0, I),   ∇U = nβ g + γ (w − w*) + d w
    w ← w + v
    ξ ← ξ + ( ‖v‖² / P − ε )

The thermostat ξ starts at D and grows or shrinks until the kinetic energy is that of temperature 1. This compensates isotropic
gradient noise of unknown size. The target is p(w) ∝ exp(−nβ L − (γ/2)‖w − w*‖² − (d/2)‖w‖²) as ε → 0.

| here      | Ding et al. | devinterp `optim.sgnht.SGNHT` |
|-----------|-------------|-------------------------------|
| epsilon   | h² = η      | lr                            |
| diffusion | a           | diffusion_factor (0.01)       |
| nbeta     | -           | nbeta                         |

devinterp 2.0.1's `SGMCMC.sgnht` computes the momentum correction but leaves it out of the update, so it is not a thermostat. Its
older class `SGNHT` is one, and this kernel is tested against that class. A coordinate that hits the bounding box is clamped, and
its momentum is reversed.

Shapes: E chains, P parameters; tensors are (P,) or (E, P), the thermostat (1,) or (E, 1).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icl.sampling.sgld import SGLDConfig, clamp_to_box, potential_gradient


@dataclass(frozen=True, kw_only=True)
class SGNHTConfig(SGLDConfig):
    """SGLD's constants and the diffusion factor D."""

    diffusion: float = 0.01


@dataclass(frozen=True)
class SGNHTState:
    """A chain's weights, its anchor w*, its step size ε, the momentum v and the thermostat ξ."""

    position: Tensor
    anchor: Tensor
    epsilon: Tensor
    momentum: Tensor
    thermostat: Tensor


def init(config: SGNHTConfig, anchor: Tensor, epsilon: Tensor, noise: Tensor) -> SGNHTState:
    """Chains that start at w* with a momentum drawn from its stationary law, √ε · noise, or at rest if there is no noise."""
    thermostat = torch.full_like(anchor[..., :1], config.diffusion)
    return SGNHTState(anchor.clone(), anchor, epsilon, config.noise_level * epsilon.sqrt() * noise, thermostat)


def step(config: SGNHTConfig, state: SGNHTState, gradient: Tensor, noise: Tensor) -> SGNHTState:
    """One update from ∇L at the current position and standard normal noise."""
    force = potential_gradient(config, state.position, state.anchor, gradient)
    kick = (2.0 * config.diffusion * state.epsilon).sqrt() * config.noise_level
    momentum = (1.0 - state.thermostat) * (state.momentum - state.epsilon * force) + kick * noise
    moved = state.position + momentum
    position = clamp_to_box(moved, state.anchor, config.bounding_box)
    momentum = torch.where(position == moved, momentum, -momentum)
    thermostat = state.thermostat + momentum.square().mean(-1, keepdim=True) - state.epsilon
    return replace(state, position=position, momentum=momentum, thermostat=thermostat)


def temperature(state: SGNHTState) -> Tensor:
    """The kinetic temperature (E,): the mean square of the momentum in units of its stationary law. 1 for the target."""
    return state.momentum.square().mean(dim=-1) / state.epsilon[..., 0]
