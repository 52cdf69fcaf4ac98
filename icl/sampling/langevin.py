r"""Underdamped Langevin dynamics by the BAOAB splitting (Leimkuhler & Matthews, Applied Mathematics Research eXpress 2013).

Targets p(w) ∝ exp(−U(w)), U = nβ L(w) + (γ/2)‖w − w*‖² + (d/2)‖w‖², through dw = p dt, dp = −∇U dt − η p dt + √(2η) dW. One step, with
h = √ε and c = exp(−η h), from the gradient at the current position:

    p ← p − h ∇U(w)                      (B: the closing half kick of the last step and the opening one of this step)
    w ← w + (h/2) p                      (A)
    p ← c p + √(1 − c²) s ξ              (O, exact Ornstein-Uhlenbeck; ξ ~ N(0, I))
    w ← w + (h/2) p                      (A)

Why it is the default: for a quadratic potential the positions have exactly the target's law at every stable h (h √λ_max < 2), where SGLD's
variance in a direction of curvature λ is too large by the factor 1/(1 − ελ/4); and a direction of curvature γ among ones of curvature λ_max
relaxes in ~√(λ_max/γ) steps, where SGLD needs ~λ_max/γ.

ε = h² makes the step size comparable with SGLD's: both diffuse by √ε per step when the friction is large.

| here     | Leimkuhler & Matthews | devinterp |
|----------|-----------------------|-----------|
| epsilon  | h²                    | -         |
| friction | γ (here η)            | -         |
| gamma    | part of U             | localization |

Shapes: E chains, P parameters; tensors are (P,) or (E, P).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icl.sampling.sgld import SGLDConfig, clamp_to_box, potential_gradient


@dataclass(frozen=True, kw_only=True)
class LangevinConfig(SGLDConfig):
    """SGLD's constants and the friction η, in units of 1/h-time; None stands for critical damping of the localisation, η = 2√(γ + d)."""

    friction: float | None = None


@dataclass(frozen=True)
class LangevinState:
    """A chain's weights, its anchor w*, its step size ε = h² and the momentum p."""

    position: Tensor
    anchor: Tensor
    epsilon: Tensor
    momentum: Tensor


def init(config: LangevinConfig, anchor: Tensor, epsilon: Tensor, noise: Tensor) -> LangevinState:
    """Chains that start at w* with standard normal momentum."""
    return LangevinState(anchor.clone(), anchor, epsilon, config.noise_level * noise)


def step(config: LangevinConfig, state: LangevinState, gradient: Tensor, noise: Tensor) -> LangevinState:
    """One update from ∇L at the current position and standard normal noise."""
    time = state.epsilon.sqrt()
    keep = torch.exp(-friction_of(config) * time)
    momentum = state.momentum - time * potential_gradient(config, state.position, state.anchor, gradient)
    halfway = state.position + 0.5 * time * momentum
    momentum = keep * momentum + (1.0 - keep.square()).sqrt() * config.noise_level * noise
    moved = halfway + 0.5 * time * momentum
    position = clamp_to_box(moved, state.anchor, config.bounding_box)
    momentum = torch.where(position == moved, momentum, -momentum)
    return replace(state, position=position, momentum=momentum)


def friction_of(config: LangevinConfig) -> float:
    """η as given, or the critical damping of the weakest direction, whose curvature is γ + d."""
    return 2.0 * (config.gamma + config.weight_decay) ** 0.5 if config.friction is None else config.friction


def temperature(state: LangevinState) -> Tensor:
    """The kinetic temperature (E,): the mean square of the momentum in units of its stationary law. 1 for the target."""
    return state.momentum.square().mean(dim=-1)
