"""Measurements for the verdict, in addition to the chains themselves."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icl.sampling.chains import ChainRun, goes_one_by_one
from icl.sampling.config import SamplerConfig
from icl.sampling.diagnostics import FEW_CHAINS, student_factor
from icl.sampling.langevin import LangevinConfig, friction_of
from icl.sampling.objective import Batch
from icl.sampling.plan import Plan, StepData
from icl.sampling.stein import UNKNOWN, Ratio, mean_ratio
from icl.sampling.tuning import effective_step
from icl.streams import Stream

PROBES = 24
PLACES = 2


class Heating(NamedTuple):
    """What the noise of mini-batches adds to λ̂, without and with the control variate; NaN if it is not known."""

    plain: float
    controlled: float


def noise_heating(config: SamplerConfig, plan: Plan, positions: Tensor) -> Heating:
    r"""What the noise of mini-batch gradients adds to λ̂, to first order in the step size, near a quadratic minimum.

    Gradient noise of covariance C raises the temperature of a direction by ε' nβ² C / 4. Each direction contributes half of its
    temperature to nβ(L − L(w*)). So λ̂ grows by

        (ε' nβ² / 8) tr C,        ε' = ε under SGLD,    ε' = ε coth(η√ε / 2) under Langevin dynamics of friction η.

    tr C is measured on PROBES batches at the last positions of up to PLACES healthy chains. The result is 0 if the batch never changes. It
    is NaN for other kernels, for which there is no such formula, and if no chain is healthy.
    """
    if plan.constant:
        return Heating(0.0, 0.0)
    if len(positions) == 0 or config.step_size is None or config.method not in ("sgld", "langevin"):
        return Heating(math.nan, math.nan)
    large = goes_one_by_one(positions)
    here = positions[:PLACES].to(plan.objective.anchor.device)
    seeds = [config.seed] * len(here)
    plain, quiet = (_RunningVariance(), _RunningVariance()) if large else (_Variance(), _Variance())
    for step in range(config.num_steps, config.num_steps + PROBES):
        data = StepData(plan, step, seeds)
        gradient = data.losses_and_gradients(here, None)[1]
        plain.add(gradient)
        if plan.mean is not None:
            quiet.add(gradient - data.control())
    step = config.step_size
    if config.method == "langevin":
        step = effective_step(config.step_size, friction_of(langevin_constants(config)))

    def added(trace: float) -> float:
        return step * config.inverse_temperature**2 * trace / 8

    return Heating(added(plain.total()), added(quiet.total()))


class _Variance:
    """The total variance of vectors (E, P) over repetitions, averaged over E; NaN without vectors."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def add(self, vectors: Tensor) -> None:
        self._held.append(vectors)

    def total(self) -> float:
        if not self._held:
            return math.nan
        return float(torch.stack(self._held).cpu().double().var(dim=0).sum(dim=-1).mean())


class _RunningVariance:
    """The same as `_Variance`, without keeping the vectors (Welford's sums)."""

    def __init__(self) -> None:
        self._mean, self._squares, self._count = torch.zeros(()), 0.0, 0

    def add(self, vectors: Tensor) -> None:
        self._count += 1
        away = vectors - self._mean
        self._mean = self._mean + away / self._count
        self._squares += float((away * (vectors - self._mean)).sum(dim=-1, dtype=torch.float64).mean())

    def total(self) -> float:
        return self._squares / (self._count - 1) if self._count > 1 else math.nan


def langevin_constants(config: SamplerConfig) -> LangevinConfig:
    """The constants that decide the friction."""
    return LangevinConfig(
        nbeta=0.0, gamma=config.localization, weight_decay=config.weight_decay, friction=config.friction
    )


def control_acceptance(epsilon: float, gamma: float, size: int, seed: int = 0) -> float:
    """Mean Metropolis acceptance of one SGLD step at nβ = 0, started from the localising Gaussian N(w*, 1/γ).

    It is near 1 if the step size is small compared with the localisation. If it is far below 1, the step is too long even without a loss.
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


def cost_of_w_star(plan: Plan, run: ChainRun, batches: Sequence[Batch]) -> tuple[Ratio, Ratio]:
    r"""How much λ̂ is too small because w* is not the minimum. There are two values, each with its standard error:

        nβ (L(w*) − L(w̄)),        −nβ ḡ·(w̄ − w*) / 2,

    where w̄ are the chains' mean weights. The first value compares the losses at w* and w̄. Its error comes from the jack-knife over
    chains. If it is above 0, w̄ is a better point than w*, and only chance can make this wrong. In a curved valley, w̄ itself is a bad point,
    and the first value says nothing. The second value, half of the decrease that the gradient at w* predicts, works there too. Both are NaN
    if there are not enough healthy chains.
    """
    nbeta, objective, healthy = plan.config.inverse_temperature, plan.objective, run.healthy
    means = run.mean_positions if bool(healthy.all()) else run.mean_positions[healthy]
    means = means.to(objective.anchor.device)
    if plan.mean is None or len(means) < 2:
        return UNKNOWN, UNKNOWN
    gradient, doubt = plan.mean.whole[0].double().cpu(), plan.mean.error[0].double().cpu()
    if goes_one_by_one(means):
        along, off = (
            torch.stack([(mean - plan.anchors[0]).double() @ each for mean in means]) for each in (gradient, doubt)
        )
        uncertain = float(off.mean())
    else:
        away = (means - plan.anchors[:1]).double().cpu()
        along, uncertain = away @ gradient, float(away.mean(dim=0) @ doubt)
    promised = mean_ratio(-nbeta / 2 * along[:, None])
    twin = Ratio(promised.value, math.hypot(promised.error, nbeta / 2 * uncertain))
    count = len(means)
    if count < FEW_CHAINS:
        return UNKNOWN, twin
    middle = means.mean(dim=0)
    if goes_one_by_one(means):
        without = ((count * middle - mean) / (count - 1) for mean in means)
        places = itertools.chain((plan.anchors[0], middle), without)
        of_places = [[objective.losses(place[None], batch) for batch in batches] for place in places]
        losses = torch.stack([torch.cat(each).double().mean(dim=-1).cpu() for each in of_places], dim=1)
    else:
        without = (count * middle - means) / (count - 1)
        places = torch.cat([plan.anchors[:1], middle[None], without])
        losses = torch.stack([objective.losses(places, batch).double().mean(dim=-1).cpu() for batch in batches])
    gains = nbeta * (losses[:, :1] - losses[:, 1:])  # (batches, 1 + E)
    cost, left_out = float(gains[:, 0].mean()), gains[:, 1:].mean(dim=0)
    spread = math.sqrt((count - 1) / count * float((left_out - left_out.mean()).square().sum()))
    sampled = float(gains[:, 0].std()) / math.sqrt(len(batches)) if len(batches) > 1 else 0.0
    return Ratio(cost, math.hypot(spread, sampled) * student_factor(count - 1)), twin
