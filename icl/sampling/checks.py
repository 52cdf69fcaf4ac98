"""Measurements that a verdict rests on, besides the chains themselves."""

import math

import torch
from torch import Tensor

from icl.sampling.config import SamplerConfig
from icl.sampling.langevin import LangevinConfig, friction_of
from icl.sampling.plan import Plan, StepData
from icl.streams import Stream

PROBES = 8


def noise_heating(config: SamplerConfig, plan: Plan, positions: Tensor) -> float:
    r"""What the noise of the gradient's batches adds to λ̂, to first order in the step, near a quadratic minimum.

    Gradient noise of covariance C raises the temperature of a direction of curvature λ by ε nβ² C / 4 under SGLD, and by √ε nβ² C / 2η
    under Langevin dynamics of friction η; each direction contributes half of its temperature to nβ(L − L(w*)):

        (ε nβ² / 8) tr C        (√ε nβ² / 4η) tr C.

    tr C is measured on PROBES batches at one healthy chain's last position. NaN for the other kernels, which have no such formula, and
    without a healthy chain.
    """
    if len(positions) == 0 or config.step_size is None or config.method not in ("sgld", "langevin"):
        return math.nan
    steps = range(config.num_steps, config.num_steps + PROBES)
    here = positions[:1].to(plan.objective.anchor.device)
    seed = config.init_seed or 0
    probes = [StepData(plan, step, [seed]).losses_and_gradients(here, None)[1] for step in steps]
    gradients = torch.cat(probes).cpu().double()
    trace = float(gradients.var(dim=0).sum())
    scale = config.inverse_temperature**2 * trace
    if config.method == "sgld":
        return config.step_size * scale / 8
    constants = LangevinConfig(
        nbeta=0.0, gamma=config.localization, weight_decay=config.weight_decay, friction=config.friction
    )
    return (
        math.sqrt(config.step_size) * scale / (4 * friction_of(constants)) if friction_of(constants) > 0 else math.nan
    )


def control_acceptance(epsilon: float, gamma: float, size: int, seed: int = 0) -> float:
    """Mean Metropolis acceptance of one SGLD step at nβ = 0, from the localising Gaussian N(w*, 1/γ) itself: the sanity step.

    1 for a step size that is small against the localisation; far below 1, the discretisation is wrong before any loss is involved.
    """
    if gamma == 0:
        return 1.0
    stream = Stream(seed, "chain/control")
    size = min(size, 2**20)
    here = stream.normal(0, (64, size)) if size <= 4096 else stream.normal(0, (4, size))
    noise = stream.normal(1, here.shape)
    # In units of 1/√γ: potential ‖u‖²/2, step size ε γ.
    step = epsilon * gamma
    there = here - 0.5 * step * here + step**0.5 * noise
    back = here - there + 0.5 * step * there
    log_ratio = 0.5 * (here.square() - there.square()).sum(-1) + 0.5 * (noise.square() - back.square() / step).sum(-1)
    return float(torch.exp(log_ratio.clamp(max=0.0)).mean())
