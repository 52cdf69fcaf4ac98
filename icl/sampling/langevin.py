r"""Underdamped Langevin dynamics by the BAOAB splitting (Leimkuhler & Matthews, Applied Mathematics Research eXpress 2013).

It samples p(w) ∝ exp(−U(w)), U = nβ L(w) + (γ/2)‖w − w*‖² + (d/2)‖w‖², by dw = p dt, dp = −∇U dt − η p dt + √(2η) dW. With h = √ε and
c = exp(−η h), one step is

    p ← p − h ∇U(w)                      (B: the closing half kick of the last step and the opening one of this step)
    w ← w + (h/2) p                      (A)
    p ← c p + √(1 − c²) s ξ              (O, exact Ornstein-Uhlenbeck; ξ ~ N(0, I))
    w ← w + (h/2) p                      (A)

The gradient is that at the current position.

This kernel is the default for two reasons. First, for a quadratic potential its positions have exactly the target distribution at every
stable h (h √λ_max < 2). SGLD's variance in a direction of curvature λ is too large by the factor 1/(1 − ελ/4). Second, a direction of
curvature γ relaxes in ~√(λ_max/γ) steps if the largest curvature is λ_max. SGLD needs ~λ_max/γ steps.

ε = h² makes the step size comparable with SGLD's: with large friction, both diffuse by √ε per step.

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

from icl.native.langevin import langevin_step
from icl.sampling.sgld import SGLDConfig, clamp_to_box, potential_gradient


@dataclass(frozen=True, kw_only=True)
class LangevinConfig(SGLDConfig):
    """SGLD's constants and the friction η, in units of 1/time with h as the time of a step. None means critical damping of the
    localisation, η = 2√(γ + d)."""

    friction: float | None = None


@dataclass(frozen=True)
class LangevinState:
    """A chain's weights, its anchor w*, its step size ε = h² and the momentum p."""

    position: Tensor
    anchor: Tensor
    epsilon: Tensor
    momentum: Tensor


def init(config: LangevinConfig, anchor: Tensor, epsilon: Tensor, noise: Tensor) -> LangevinState:
    """The state of chains that start at w* with standard normal momentum."""
    return LangevinState(anchor.clone(), anchor, epsilon, config.noise_level * noise)


def step(config: LangevinConfig, state: LangevinState, gradient: Tensor, noise: Tensor) -> LangevinState:
    """One update from ∇L at the current position and standard normal noise."""
    time, keep, rough = coefficients = _coefficients(config, state)
    moved = _compiled(config, state, gradient, noise, coefficients, None)
    if moved is not None:
        return replace(state, position=moved[0], momentum=moved[1])
    momentum = state.momentum - time * potential_gradient(config, state.position, state.anchor, gradient)
    halfway = state.position + 0.5 * time * momentum
    momentum = keep * momentum + rough * noise
    moved = halfway + 0.5 * time * momentum
    position = clamp_to_box(moved, state.anchor, config.bounding_box)
    momentum = torch.where(position == moved, momentum, -momentum)
    return replace(state, position=position, momentum=momentum)


def step_in_place(config: LangevinConfig, state: LangevinState, gradient: Tensor, noise: Tensor) -> bool:
    """`step`, written into the state's own position and momentum. False, and nothing is changed, where it is not compiled."""
    out = state.position, state.momentum
    return _compiled(config, state, gradient, noise, _coefficients(config, state), out) is not None


def _compiled(
    config: LangevinConfig,
    state: LangevinState,
    gradient: Tensor,
    noise: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    if config.bounding_box is not None:
        return None
    tensors = (state.position, state.anchor, gradient, noise, state.momentum)
    return langevin_step((config.nbeta, config.gamma, config.weight_decay), coefficients, tensors, out)


def _coefficients(config: LangevinConfig, state: LangevinState) -> tuple[Tensor, Tensor, Tensor]:
    """h, c and √(1 − c²) s, each (E, 1)."""
    time = state.epsilon.sqrt()
    keep = torch.exp(-friction_of(config) * time)
    return time, keep, (1.0 - keep.square()).sqrt() * config.noise_level


def friction_of(config: LangevinConfig) -> float:
    """The given η, or critical damping of the weakest direction, whose curvature is γ + d."""
    return 2.0 * (config.gamma + config.weight_decay) ** 0.5 if config.friction is None else config.friction


def temperature(state: LangevinState) -> Tensor:
    """The kinetic temperature (E,): the mean square of the momentum. It is 1 for the target distribution."""
    return state.momentum.square().mean(dim=-1)
