r"""Pilot chains: short chains that find the sampler's settings.

nβ and γ define the quantity that is estimated. They are fixed first, and are never changed to make sampling easier.

The potential is U = nβ L + (γ/2)‖w − w*‖². Pilot chains of the underdamped kernel start at w*. Each chain tracks λ_max, the largest
curvature of U along its path. It does one power iteration per step and starts each from the last direction. The Hessian times this
direction is a difference of two gradients on one batch, over the thermal width 1/√λ_max. So it is the mean curvature over the width
that a chain explores, not the curvature at a point.

1. **Localisation**, if none is given: γ = max(1, λ_max / SOFTEST), to three digits. A direction SOFTEST times softer than the stiffest
   one thus counts as flat. The rule depends only on the model, not on noise, step or budget. A run applies it once for all its
   checkpoints.
2. **Gradient.** On mini-batches the control variate (`icl.sampling.control`) is used if it reduces the noise by more than it costs.
3. **Step.** An explicit integrator is stable while h √λ_max < 2; h = SAFETY / √λ_max leaves room for larger curvature. Batch noise of
   covariance C has the same effect on a direction as under SGLD of step ε' = h² coth(ηh/2). It adds (ε' nβ²/8) tr C to λ̂. If this is
   more than NOISE_SHARE of λ̂, or more than STIFF_SHARE in the stiff directions, the friction η is increased first, then h is reduced.

Cost: about two gradients per pilot step and chain, and a few more on mini-batches.

Shapes: E chains, P sampled parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icl.sampling import langevin
from icl.sampling.chains import goes_one_by_one
from icl.sampling.noise import chain_seeds, noise_blocks
from icl.sampling.plan import Plan, StepData

SAFETY = 0.7
SOFTEST = 44_100.0
LEAST_GAMMA = 1.0
NOISE_SHARE = 0.03
STIFF_SHARE = 0.05
PILOT_CHAINS = 4
MIN_PILOT_STEPS = 300
FORGET = 0.97
START_ITERATIONS = 10
START_GAMMA = 100.0
LOOSEN = 0.985
NOISE_EVERY = 10
REMEMBER = 0.9
SLOWEST = 1.313
"""ε'/h² at ηh = 2. This is the largest friction used, because more friction only slows a chain."""


@dataclass(frozen=True)
class Tuned:
    """The settings and measurements that the pilot found.

    Attributes:
        epsilon: step size ε = h².
        friction: η; None: critical damping of the localisation.
        gamma: localisation γ.
        control: whether the control variate reduces the noise by more than it costs.
        curvature: λ_max.
        noise_trace: tr C, the total variance of a batch's gradient, with the control variate if that is used.
        plain_noise_trace: tr C without it.
        llc: λ̂ at the pilot's end, a first guess.
        gradients: gradient evaluations spent.
    """

    epsilon: float
    friction: float | None
    gamma: float
    control: bool
    curvature: float
    noise_trace: float
    plain_noise_trace: float
    llc: float
    gradients: int


def tune(plan: Plan, seed: int) -> Tuned:
    """Run the pilot; a pure function of plan and seed."""
    config, objective = plan.config, plan.objective
    steps = max(MIN_PILOT_STEPS, config.num_burnin_steps)
    first = chain_seeds(seed, 1, config.noise_law)[0]
    seeds = [first + 7919 * (chain + 1) for chain in range(PILOT_CHAINS)]
    anchor = objective.anchor.expand(PILOT_CHAINS, -1)
    noises = noise_blocks(seeds, steps + 1, anchor, "chain/pilot")
    nbeta = config.inverse_temperature

    power = _PowerIteration(nbeta, anchor, noisy=not plan.constant)
    noise = _BatchNoise(plan, seeds)
    gamma = START_GAMMA if config.gamma is None else config.gamma
    largest, llc, spent, step_size = 0.0, 1.0, 0, 0.0
    state = langevin.init(langevin.LangevinConfig(nbeta=nbeta), anchor, torch.ones_like(anchor[:, :1]), next(noises))
    for step in range(steps):
        data = StepData(plan, step, seeds)
        losses, gradient = data.losses_and_gradients(state.position, None)
        if not bool(torch.isfinite(gradient).all()):
            # The curvature is larger than any before. Start again at w*, with half the step.
            largest *= 4.0
            state = replace(state, position=anchor.clone(), momentum=torch.zeros_like(anchor))
            losses, gradient = data.losses_and_gradients(anchor, None)
        repeats = START_ITERATIONS if step == 0 else 1
        curvature = power.observe(data, state.position, gradient, gamma, repeats)
        largest = max(largest * (FORGET if step < steps // 2 else 1.0), curvature)
        spent += PILOT_CHAINS * (1 + repeats)

        driving = gradient if plan.constant else gradient - data.control()
        excess = (losses - data.anchor_losses()).mean(dim=-1)
        if not plan.constant:
            excess = excess - (data.control() * (state.position - anchor)).sum(dim=-1)
            if step % NOISE_EVERY == 0 and step >= steps // 4:
                spent += noise.observe(step, data, state.position, gradient)
        now = nbeta * float(excess.mean())
        llc = max(0.95 * llc + 0.05 * now, 1.0) if math.isfinite(now) else llc

        total = largest + gamma
        step_size = SAFETY / math.sqrt(total) if plan.constant else _quiet_step(total)
        if config.gamma is None:
            # Loosen slowly, because the curvature of a degenerate minimum shows only when the chains have spread out.
            gamma = max(total / SOFTEST, LOOSEN * gamma, LEAST_GAMMA)
        constants = langevin.LangevinConfig(
            nbeta=nbeta, gamma=gamma, weight_decay=config.weight_decay, bounding_box=config.bounding_box_size,
            friction=None if plan.constant else 2.0 / step_size,
        )  # fmt: skip
        size = torch.full_like(state.epsilon, step_size**2)
        state = langevin.step(constants, replace(state, epsilon=size), driving, next(noises))

    if config.gamma is None:
        gamma = localisation_for(largest)
    total = largest + gamma
    control = not plan.constant and config.control_variates != "off" and (
        config.control_variates == "on" or noise.plain > (1 + _cost_of_control(plan)) * noise.controlled
    )  # fmt: skip
    trace, stiff = (noise.controlled, noise.stiff_controlled) if control else (noise.plain, noise.stiff_plain)
    epsilon, friction = _chosen_step(total, gamma + config.weight_decay, nbeta, llc, trace, stiff)
    return Tuned(epsilon, friction, gamma, control, total, trace, noise.plain, llc, spent)


def localisation_for(curvature: float) -> float:
    """γ by rule 1, to three digits."""
    return float(f"{max(LEAST_GAMMA, curvature / SOFTEST):.3g}")


def effective_step(epsilon: float, friction: float) -> float:
    """ε' = h² coth(ηh/2) with h = √ε: the step size of SGLD at which batch noise heats a chain by the same amount."""
    half = friction * math.sqrt(epsilon) / 2
    return epsilon / math.tanh(half) if half > 0 else math.inf


def _quiet_step(curvature: float) -> float:
    """h of the pilot on mini-batches, with friction 2/h: a twentieth of the stable step of SGLD."""
    return math.sqrt(0.05 / curvature / SLOWEST)


def _chosen_step(
    curvature: float, softest: float, nbeta: float, llc: float, noise_trace: float, stiff_share: float
) -> tuple[float, float | None]:
    """ε and η by rule 3; `stiff_share` is tr(HC) / tr H."""
    longest = SAFETY / math.sqrt(curvature)
    if noise_trace <= 0:
        return longest**2, None
    allowed = NOISE_SHARE * 8 * llc / (nbeta**2 * noise_trace)
    if stiff_share > 0:
        allowed = min(allowed, STIFF_SHARE * 4 / (nbeta**2 * stiff_share))
    critical = 2 * math.sqrt(softest)
    if effective_step(longest**2, critical) <= allowed:
        return longest**2, None
    if SLOWEST * longest**2 <= allowed:
        # ε' = h² coth(ηh/2) = allowed, solved for η.
        return longest**2, 2 * math.atanh(longest**2 / allowed) / longest
    time = math.sqrt(allowed / SLOWEST)
    return time**2, 2 / time


def _cost_of_control(plan: Plan) -> float:
    """Gradients at w* per gradient of a chain."""
    return 1.0 if plan.config.independent_batches else 1.0 / plan.config.num_chains


class _BatchNoise:
    """The variance of a batch's gradient where the pilot chains are, with and without its control variate.

    Attributes:
        plain, controlled: tr C.
        stiff_plain, stiff_controlled: tr(HC) / tr H, with H the Hessian of L.
    """

    def __init__(self, plan: Plan, seeds: list[int]) -> None:
        self._plan, self._seeds = plan, seeds
        self.plain = self.controlled = self.stiff_plain = self.stiff_controlled = 0.0
        self._traces = torch.zeros(5, dtype=torch.float64)
        self._count = 0

    def observe(self, step: int, data: StepData, positions: Tensor, gradients: Tensor) -> int:
        """One look, at the batches of this step and of the next two; returns the gradients that it took."""
        met = (data, *(StepData(self._plan, step + ahead, self._seeds) for ahead in (1, 2)))
        if goes_one_by_one(positions):
            rows = [
                self._values(
                    step, [each.of_chain(row) for each in met], positions[row : row + 1], gradients[row : row + 1]
                )
                for row in range(len(positions))
            ]
            values = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        else:
            values = self._values(step, met, positions, gradients)
        self._traces += torch.stack([value.double().mean().cpu() for value in values])
        self._count += 1
        self.plain, self.controlled, stiff_plain, stiff_controlled, trace = (self._traces / self._count).tolist()
        if trace > 0:
            self.stiff_plain, self.stiff_controlled = max(stiff_plain, 0.0) / trace, max(stiff_controlled, 0.0) / trace
        return PILOT_CHAINS * 5

    def _values(self, step: int, met: Sequence[StepData], positions: Tensor, gradients: Tensor) -> list[Tensor]:
        """(E,) each: |g − g'|²/2 without and with the control variate, the curvature along both, and along random signs."""
        data, other, third = met
        plain = gradients - other.losses_and_gradients(positions, None)[1]
        controlled = plain - (data.anchor_gradients() - other.anchor_gradients())
        here = third.losses_and_gradients(positions, None)[1]
        signs = torch.sign(torch.sin(torch.arange(positions.shape[1], device=positions.device) * 2.399963 + 0.5 + step))
        directions = (plain, controlled, signs.to(positions).expand_as(positions))
        nbeta = self._plan.config.inverse_temperature
        bent = [_curvature_along(third, positions, here, each, nbeta) for each in directions]
        return [plain.square().sum(-1) / 2, controlled.square().sum(-1) / 2, bent[0] / 2, bent[1] / 2, bent[2]]


def _curvature_along(data: StepData, positions: Tensor, gradients: Tensor, directions: Tensor, nbeta: float) -> Tensor:
    """dᵀ ∇²L d (E,) for directions d (E, P), by a difference of gradients on one batch."""
    length = directions.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    moved = 1e-2 * math.sqrt(positions.shape[1] / max(nbeta, 1.0))
    shifted = data.losses_and_gradients(positions + moved * directions / length, None)[1]
    return (directions * (shifted - gradients)).sum(dim=-1) * length[:, 0] / moved


class _PowerIteration:
    """The largest curvature of nβ L felt around moving chains (E, P).

    On batches that change, the product is averaged over steps and its curvature is a Rayleigh quotient, which the noise of a batch does
    not raise.
    """

    def __init__(self, nbeta: float, anchor: Tensor, noisy: bool) -> None:
        self._nbeta, self._noisy = nbeta, noisy
        # Any direction with weight on all coordinates is suitable. The irrational stride avoids alignment with structure.
        # Made on the host: not every device has float64.
        phases = torch.arange(anchor.shape[1], dtype=torch.float64) * 2.399963229728653
        direction = torch.sin(phases + 0.5).to(anchor.dtype).to(anchor.device)
        self._direction = (direction / direction.norm()).expand_as(anchor).clone()
        self._curvature = torch.zeros_like(anchor[:, :1])
        self._product = torch.zeros_like(anchor)

    def observe(self, data: StepData, positions: Tensor, gradients: Tensor, gamma: float, repeats: int) -> float:
        """Iterate at the chains' positions, with their gradients (E, P) given; the largest curvature among them."""
        for _ in range(repeats):
            width = (self._curvature + gamma).rsqrt()
            # In place, because these vectors are the peak of an estimate's memory.
            _, shifted = data.losses_and_gradients((width * self._direction).add_(positions), None)
            product = shifted.sub_(gradients).mul_(self._nbeta).div_(width)
            if self._noisy:
                product = self._averaged(product)
            norm = product.norm(dim=-1, keepdim=True)
            usable = torch.isfinite(norm) & (norm > 0)
            along = (product * self._direction).sum(dim=-1, keepdim=True).clamp(min=0.0) if self._noisy else norm
            torch.where(usable, product / norm, self._direction, out=self._direction)
            self._curvature = torch.where(usable, along, self._curvature)
        return float(self._curvature.max())

    def _averaged(self, product: Tensor) -> Tensor:
        empty = (self._product == 0).all(dim=-1, keepdim=True)
        mixed = torch.where(empty, product, REMEMBER * self._product + (1 - REMEMBER) * product)
        self._product = torch.where(torch.isfinite(mixed).all(dim=-1, keepdim=True), mixed, self._product)
        return self._product
