r"""Stochastic gradient Langevin dynamics with localisation (Welling & Teh 2011; Lau et al. 2023, arXiv 2308.12108).

The target is the localised, tempered posterior (exact as ε → 0 with exact gradients)

    p(w) ∝ exp( −nβ L(w) − (γ/2)‖w − w*‖² − (d/2)‖w‖² )

by

    w ← w − (ε/2) [ nβ g + γ (w − w*) + d w ] + √ε s ξ,      ξ ~ N(0, I),   g an unbiased estimate of ∇L(w),

optionally followed by clamping every coordinate to w* ± box. The noise level s is 1 for sampling; other values target temperature s².

| here            | Lau et al. | devinterp `SGMCMC.sgld` | reference code (arXiv 2402.02364)      |
|-----------------|------------|-------------------------|----------------------------------------|
| epsilon         | ε          | lr                      | epsilon = noise_scale                  |
| nbeta           | nβ         | nbeta                   | n / temperature = 2 gradient_scale / ε |
| gamma           | γ          | localization            | gamma = 2 localization_scale / ε       |
| weight_decay    | -          | weight_decay            | weight_decay                           |
| noise_level     | -          | noise_level             | noise_level                            |
| bounding_box    | -          | bounding_box_size       | bounding_box_size                      |

Shapes: E chains, P parameters; every tensor is (P,) or (E, P), every chain's own step size (), or (E, 1).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SGLDConfig:
    """Constants of the update; the symbols are those of the module's docstring."""

    nbeta: float
    gamma: float = 0.0
    weight_decay: float = 0.0
    noise_level: float = 1.0
    bounding_box: float | None = None


@dataclass(frozen=True)
class SGLDState:
    """Where a chain is: its weights, the point w* that holds it, and its step size ε."""

    position: Tensor
    anchor: Tensor
    epsilon: Tensor


def init(config: SGLDConfig, anchor: Tensor, epsilon: Tensor, noise: Tensor) -> SGLDState:
    """Chains that start at w*. `noise` is unused; it is there because all kernels have the same signature."""
    return SGLDState(position=anchor.clone(), anchor=anchor, epsilon=epsilon)


def step(config: SGLDConfig, state: SGLDState, gradient: Tensor, noise: Tensor) -> SGLDState:
    """One update from ∇L at the current position and standard normal noise, both of the position's shape."""
    drift = potential_gradient(config, state.position, state.anchor, gradient)
    moved = state.position - 0.5 * state.epsilon * drift + state.epsilon.sqrt() * config.noise_level * noise
    return replace(state, position=clamp_to_box(moved, state.anchor, config.bounding_box))


def potential_gradient(config: SGLDConfig, position: Tensor, anchor: Tensor, gradient: Tensor) -> Tensor:
    """∇U = nβ ∇L + γ (w − w*) + d w, the gradient of minus the log-density."""
    drift = config.nbeta * gradient + config.gamma * (position - anchor)
    return drift + config.weight_decay * position if config.weight_decay else drift


def clamp_to_box(position: Tensor, anchor: Tensor, box: float | None) -> Tensor:
    """The position with every coordinate clamped to w* ± box; unchanged if box is None."""
    return position if box is None else torch.clamp(position, min=anchor - box, max=anchor + box)
