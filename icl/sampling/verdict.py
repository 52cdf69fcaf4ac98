"""What a run of chains is worth, in plain words."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.sampling.config import SamplerConfig
from icl.sampling.data import Plan, StepData
from icl.sampling.langevin import LangevinConfig, friction_of
from icl.streams import Stream

RHAT_LIMIT = 1.1
ESS_LIMIT = 100.0
RISE_LIMIT = 3.0
HEATING_LIMIT = 0.1
BASIN_SLACK = 0.05
PROBES = 8


@dataclass(frozen=True)
class Verdict:
    """Whether an estimate may be trusted, and why not."""

    trusted: bool
    text: str


def judge(
    excess: Tensor,
    *,
    num_lost: int,
    rhat: float,
    ess: float,
    mcse: float,
    mean_loss: float,
    init_loss: float,
    reference_loss: float | None,
    noise_heating: float = 0.0,
) -> Verdict:
    """Judge the healthy chains' trace of nβ(L − L(w*)).

    Args:
        excess: (E, N), chains that stayed finite.
        num_lost: chains that did not.
        mean_loss, init_loss: E[L] and L(w*).
        reference_loss: a loss that no useful model exceeds, such as that of predicting zero; chains above it have left the basin. Where
            w* is itself hardly better or worse, as early in training, chains may rise by BASIN_SLACK of it above w*, and a verdict cannot
            tell whether they left. None leaves the question open everywhere.
        noise_heating: what the batches' noise adds to the mean.
    """
    lost = f"{num_lost} of {num_lost + len(excess)} chains diverged: smaller epsilon" if num_lost else ""
    if len(excess) == 0:
        return Verdict(False, lost)
    problems = [lost] if lost else []
    if reference_loss is not None:
        rim = max(reference_loss, init_loss + BASIN_SLACK * reference_loss)
        if mean_loss > rim:
            # A larger nbeta holds chains by the loss itself; a larger gamma holds them by force.
            problems.append(
                f"left the basin: the chain loss {mean_loss:.4g} is above {rim:.4g}, that of a model that has learnt nothing "
                "(larger gamma or nbeta, smaller epsilon)"
            )
    mean = float(excess.mean())
    if mean < -2 * mcse:
        problems.append("negative: the chains found lower loss than w*, which is no minimum")
    if _rising(excess):
        problems.append("still rising: more burn-in")
    if rhat > RHAT_LIMIT:
        problems.append(f"chains disagree: split R-hat {rhat:.3f} is above {RHAT_LIMIT} (more draws, more burn-in)")
    elif not ess >= ESS_LIMIT:
        problems.append(
            f"too few independent draws: effective sample size {ess:.0f} is below {ESS_LIMIT:.0f} (more draws)"
        )
    if noise_heating > HEATING_LIMIT * max(abs(mean), 1.0):
        problems.append(
            f"heated by its batches: their noise adds about {noise_heating:.3g} to the estimate "
            "(larger batches, smaller epsilon or smaller nbeta)"
        )
    return Verdict(not problems, "; ".join(problems) if problems else "healthy")


def _rising(excess: Tensor) -> bool:
    """Whether the last third lies above the middle third by more than chance, judged by the spread of that difference over chains."""
    third = excess.shape[1] // 3
    if third < 10:
        return False
    gain = excess[:, -third:].mean(dim=1) - excess[:, third : 2 * third].mean(dim=1)
    if len(gain) < 3:
        return False
    error = float(gain.std()) / len(gain) ** 0.5
    mean = float(gain.mean())
    return mean > RISE_LIMIT * error and mean > 0.05 * float(excess.mean().abs())


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
