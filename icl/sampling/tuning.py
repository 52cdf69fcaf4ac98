r"""Step size and localisation found by pilot chains, by two stated rules; nothing is tuned to a model by hand.

The potential is U = nβ L + (γ/2)‖w − w*‖². Pilot chains of the underdamped kernel start at w*, and each follows λ_max, the
largest curvature of U that it meets, by one step of power iteration per step, warm-started from the last. The Hessian times the
current direction is a difference of two gradients on one batch over the thermal width 1/√λ_max: the curvature that a chain
feels, not the one at a point.

1. **Step size.** An explicit integrator is stable while h √λ_max < 2; h = SAFETY / √λ_max leaves room for stiffer places. Where
   gradients are noisy, h is lowered until the noise of the batches heats the chain by no more than NOISE_SHARE of λ̂: noise of
   covariance C in the gradient of L enters the momentum as h² nβ² C per step and leaves it at the rate 2ηh, which adds
   (h nβ² / 4η) tr C to λ̂.
2. **Localisation.** The weakest directions have curvature γ and, critically damped (η = 2√γ), forget in 1/(h√γ) steps. γ is the
   smallest value that lets a chain forget RELAXATIONS times during its draws: a weaker localisation biases λ̂ less, and cannot
   be sampled with that many steps.

Cost: about two gradients per pilot step and chain.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icl.sampling import langevin
from icl.sampling.noise import noise_blocks
from icl.sampling.plan import Plan, StepData

SAFETY = 0.7
RELAXATIONS = 10.0
NOISE_SHARE = 0.03
PILOT_CHAINS = 4
MIN_PILOT_STEPS = 300
FORGET = 0.97
START_ITERATIONS = 10
START_GAMMA = 100.0
LOOSEN = 0.985
NOISE_EVERY = 10


@dataclass(frozen=True)
class Tuned:
    """What the pilot found.

    Attributes:
        epsilon: step size ε = h².
        gamma: localisation γ.
        curvature: λ_max.
        noise_trace: tr C, the total variance of a batch's gradient (after control variates).
        gradients: gradient evaluations spent.
    """

    epsilon: float
    gamma: float
    curvature: float
    noise_trace: float
    gradients: int


def tune(plan: Plan, seed: int) -> Tuned:
    """Run the pilot; a pure function of plan and seed."""
    config, objective = plan.config, plan.objective
    steps = max(MIN_PILOT_STEPS, config.num_burnin_steps)
    seeds = [seed + 7919 * (chain + 1) for chain in range(PILOT_CHAINS)]
    anchor = objective.anchor.expand(PILOT_CHAINS, -1)
    noises = noise_blocks(seeds, steps + 1, anchor, "chain/pilot")
    # h √γ; with fewer draws than a few relaxations, γ would grow to the largest curvature and beyond.
    relaxation = min(RELAXATIONS / (config.num_draws * config.num_steps_bw_draws), SAFETY / 4)
    nbeta = config.inverse_temperature

    power = _PowerIteration(nbeta, anchor)
    gamma = START_GAMMA if config.gamma is None else config.gamma
    largest, noise_trace, llc, spent = 0.0, 0.0, 1.0, 0
    time = 0.0
    state = langevin.init(langevin.LangevinConfig(nbeta=nbeta), anchor, torch.ones_like(anchor[:, :1]), next(noises))
    for step in range(steps):
        data = StepData(plan, step, seeds)
        losses, gradient = data.losses_and_gradients(state.position, None)
        if not bool(torch.isfinite(gradient).all()):
            # Stiffer than what was met so far: start over at w*, with steps half as long.
            largest *= 4.0
            state = replace(state, position=anchor.clone(), momentum=torch.zeros_like(anchor))
            losses, gradient = data.losses_and_gradients(anchor, None)
        repeats = START_ITERATIONS if step == 0 else 1
        curvature = power.observe(data, state.position, gradient, gamma, repeats)
        largest = max(largest * (FORGET if step < steps // 2 else 1.0), curvature)
        spent += PILOT_CHAINS * (1 + repeats)

        excess = nbeta * float((losses - data.anchor_losses()).mean())
        llc = max(0.95 * llc + 0.05 * excess, 1.0) if math.isfinite(excess) else llc
        if step % NOISE_EVERY == 0:
            _, other = StepData(plan, step + 1, seeds).losses_and_gradients(state.position, None)
            fresh = float((other - gradient).square().sum(dim=-1).mean()) / 2
            noise_trace = fresh if step == 0 else 0.8 * noise_trace + 0.2 * fresh
            spent += PILOT_CHAINS

        time = _time_step(largest + gamma, nbeta, noise_trace, llc, relaxation, config.gamma)
        if config.gamma is None:
            # Loosened slowly: the curvature of a degenerate minimum shows only once the chains have spread out.
            gamma = max((relaxation / time) ** 2, LOOSEN * gamma)
        constants = langevin.LangevinConfig(
            nbeta=nbeta, gamma=gamma, weight_decay=config.weight_decay, bounding_box=config.bounding_box_size
        )
        state = langevin.step(
            constants, replace(state, epsilon=torch.full_like(state.epsilon, time * time)), gradient, next(noises)
        )
    return Tuned(time * time, gamma, largest + gamma, noise_trace, spent)


def _time_step(
    curvature: float, nbeta: float, noise_trace: float, llc: float, relaxation: float, gamma: float | None
) -> float:
    """The largest h that both rules allow; `relaxation` is h √γ, which fixes γ where none is given."""
    time = SAFETY / math.sqrt(curvature)
    heating = nbeta**2 * noise_trace
    if heating > 0:
        allowed = NOISE_SHARE * llc
        # tr-C rule with η = 2√γ: h heating / (8 √γ) ≤ allowed, where √γ = relaxation / h if γ follows h.
        limit = (
            math.sqrt(8 * relaxation * allowed / heating) if gamma is None else 8 * math.sqrt(gamma) * allowed / heating
        )
        time = min(time, max(limit, 1e-3 * time))
    return time


class _PowerIteration:
    """The largest curvature of nβ L felt around moving chains (E, P)."""

    def __init__(self, nbeta: float, anchor: Tensor) -> None:
        self._nbeta = nbeta
        # Any direction with weight on all coordinates will do; the irrational stride keeps it from aligning with structure.
        # Made on the host: not every device has float64.
        phases = torch.arange(anchor.shape[1], dtype=torch.float64) * 2.399963229728653
        direction = torch.sin(phases + 0.5).to(anchor.dtype).to(anchor.device)
        self._direction = (direction / direction.norm()).expand_as(anchor).clone()
        self._curvature = torch.zeros_like(anchor[:, :1])

    def observe(self, data: StepData, positions: Tensor, gradients: Tensor, gamma: float, repeats: int) -> float:
        """Iterate at the chains' positions, with their gradients (E, P) given; the largest curvature among them."""
        for _ in range(repeats):
            width = (self._curvature + gamma).rsqrt()
            _, shifted = data.losses_and_gradients(positions + width * self._direction, None)
            product = self._nbeta * (shifted - gradients) / width
            norm = product.norm(dim=-1, keepdim=True)
            usable = torch.isfinite(norm) & (norm > 0)
            self._direction = torch.where(usable, product / norm, self._direction)
            self._curvature = torch.where(usable, norm, self._curvature)
        return float(self._curvature.max())
