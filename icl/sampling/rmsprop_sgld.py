r"""SGLD with RMSProp's diagonal preconditioner (Li, Chen, Carlson & Carin, AAAI 2016, without the curvature term Γ).

    V ← α V + (1 − α) g²           G = 1 / (√V + η)          (elementwise)
    w ← w − (ε/2) G [ nβ g + γ (w − w*) + d w ] + √(ε G) s ξ,     ξ ~ N(0, I)

If G varies slowly, the target is the density of `icl.sampling.sgld`. Leaving out Γ(w) = Σ ∂G/∂w causes a bias that vanishes as α → 1.
Preconditioning acts on the gradient, the localisation, the weight decay and the noise alike.

| here         | Li et al. | devinterp `SGMCMC.rmsprop_sgld` |
|--------------|-----------|---------------------------------|
| decay        | α         | alpha (0.99)                    |
| stability    | λ         | eps (0.1)                       |
| epsilon      | 2 ε       | lr                              |
| nbeta, gamma, weight_decay, noise_level, bounding_box as in `icl.sampling.sgld`              |

Shapes: E chains, P parameters; tensors are (P,) or (E, P).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icl.sampling.sgld import SGLDConfig, clamp_to_box, potential_gradient


@dataclass(frozen=True, kw_only=True)
class RMSPropSGLDConfig(SGLDConfig):
    """SGLD's constants and the preconditioner's: the memory α of squared gradients and the stability term η."""

    decay: float = 0.99
    stability: float = 0.1


@dataclass(frozen=True)
class RMSPropSGLDState:
    """A chain's weights, its anchor w*, its step size ε and the moving mean V of squared gradients."""

    position: Tensor
    anchor: Tensor
    epsilon: Tensor
    square_average: Tensor


def init(config: RMSPropSGLDConfig, anchor: Tensor, epsilon: Tensor, noise: Tensor) -> RMSPropSGLDState:
    """Chains that start at w* with V = 0, as in devinterp. The first steps are then long, so burn-in matters."""
    return RMSPropSGLDState(anchor.clone(), anchor, epsilon, torch.zeros_like(anchor))


def step(config: RMSPropSGLDConfig, state: RMSPropSGLDState, gradient: Tensor, noise: Tensor) -> RMSPropSGLDState:
    """One update from ∇L at the current position and standard normal noise."""
    square_average = config.decay * state.square_average + (1 - config.decay) * gradient.square()
    metric = 1.0 / (square_average.sqrt() + config.stability)
    drift = potential_gradient(config, state.position, state.anchor, gradient)
    moved = (
        state.position
        - 0.5 * state.epsilon * metric * drift
        + (state.epsilon * metric).sqrt() * config.noise_level * noise
    )
    position = clamp_to_box(moved, state.anchor, config.bounding_box)
    return replace(state, position=position, square_average=square_average)
