r"""The search for constants to which the estimate is insensitive.

Every cell of a grid over ε, γ and nβ is sampled with one budget, seed and data. The criterion:

1. A cell is **healthy** if its verdict is (`icl.sampling.verdict`): no chain lost, in the basin, levelled off, chains agree,
   enough draws.
2. A healthy cell is **insensitive** if, along ε and along γ, it has a healthy neighbour on the grid whose λ̂ agrees within 10 %
   or two standard errors of the difference, whichever is more. An axis with one value has no say.
3. **Recommended** is the insensitive cell of the largest nβ (λ̂ is asymptotic in nβ), among those the one with the smallest
   relative standard error. If no cell is insensitive there is no recommendation.

Each cell also carries the Metropolis acceptance of the control at nβ = 0.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd

from icl.sampling.config import SamplerConfig
from icl.sampling.data import BatchSource
from icl.sampling.llc import LLCResult, estimate_llc_of
from icl.sampling.objective import Batch, Objective

GUIDE_EPSILON = (1e-6, 1e-5, 1e-4)
GUIDE_NBETA = (1.0, 10.0, 100.0)
GUIDE_GAMMA = (10.0, 100.0, 1000.0)
AGREEMENT = 0.10


@dataclass(frozen=True)
class Calibration:
    """A finished search.

    Attributes:
        table: one row per cell: epsilon, gamma, nbeta, llc, mcse, rhat, ess, excess (E[L] − L(w*)), distance, lost, acceptance (of the
            control), healthy, insensitive, verdict.
        traces: one row per cell, chain and draw: epsilon, gamma, nbeta, chain, draw, loss, running (λ̂ so far).
        recommended: (ε, γ, nβ), or None.
        text: the finding in one sentence.
    """

    table: pd.DataFrame
    traces: pd.DataFrame
    recommended: tuple[float, float, float] | None
    text: str


def calibrate(
    objective: Objective,
    batches: BatchSource | Iterable[Batch],
    base: SamplerConfig,
    *,
    epsilons: Sequence[float] = GUIDE_EPSILON,
    gammas: Sequence[float] = GUIDE_GAMMA,
    nbetas: Sequence[float] = GUIDE_NBETA,
    reference_loss: float | None = None,
    progress: Callable[[int, int, LLCResult], None] | None = None,
) -> Calibration:
    """Sample every cell of the grid with the base's budget (chains, draws, burn-in, batches, seed) and judge.

    Args:
        base: must not fix the constants by scales; its own epsilon, gamma, nbeta and temperature are replaced.
        progress: called with (cells done, cells in all, the last result).

    Raises:
        ValueError: the base fixes gradient_scale, or an axis is empty.
    """
    if base.gradient_scale is not None:
        raise ValueError(
            "a calibration searches epsilon, gamma and nbeta; leave out gradient_scale, localization_scale and noise_scale"
        )
    cells = list(product(epsilons, gammas, nbetas))
    if not cells:
        raise ValueError("give at least one value each of epsilons, gammas and nbetas")
    held = batches if callable(batches) else list(batches)
    rows, traces = [], []
    for index, (epsilon, gamma, nbeta) in enumerate(cells):
        constants = {"epsilon": epsilon, "gamma": gamma, "nbeta": nbeta, "temperature": None}
        config = SamplerConfig.parse(base.model_dump() | constants | {"init_seed": base.init_seed or 0})
        result = estimate_llc_of(objective, held, config, reference_loss=reference_loss)
        cell = {"epsilon": epsilon, "gamma": gamma, "nbeta": nbeta}
        rows.append(cell | {
            "llc": result.llc_mean, "mcse": result.llc_mcse, "rhat": result.llc_rhat, "ess": result.llc_ess,
            "excess": result.mean_loss - result.init_loss, "distance": result.distance, "lost": result.num_lost,
            "acceptance": result.control_acceptance, "healthy": result.verdict.trusted, "verdict": result.verdict.text,
        })  # fmt: skip
        traces.append(_trace(cell, result))
        if progress is not None:
            progress(index + 1, len(cells), result)
    table = judge(pd.DataFrame(rows))
    recommended, text = recommend(table)
    return Calibration(table, pd.concat(traces, ignore_index=True), recommended, text)


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its column `insensitive`: rule 2 of the module's docstring."""
    cells = table.to_dict("records")
    return table.assign(insensitive=[_insensitive(cell, cells) for cell in cells])


def _insensitive(cell: Mapping[Hashable, Any], cells: Sequence[Mapping[Hashable, Any]]) -> bool:
    if not cell["healthy"]:
        return False
    for axis in ("epsilon", "gamma"):
        values = sorted({other[axis] for other in cells})
        if len(values) == 1:
            continue
        place = values.index(cell[axis])
        near = {values[i] for i in (place - 1, place + 1) if 0 <= i < len(values)}
        fixed = [name for name in ("epsilon", "gamma", "nbeta") if name != axis]
        neighbours = [
            other for other in cells if other[axis] in near and all(other[name] == cell[name] for name in fixed)
        ]
        if not any(_agrees(cell, other) for other in neighbours):
            return False
    return True


def _agrees(cell: Mapping[Hashable, Any], other: Mapping[Hashable, Any]) -> bool:
    tolerance = max(AGREEMENT * abs(cell["llc"]), 2 * math.hypot(cell["mcse"], other["mcse"]))
    return bool(other["healthy"]) and abs(cell["llc"] - other["llc"]) <= tolerance


def recommend(table: pd.DataFrame) -> tuple[tuple[float, float, float] | None, str]:
    """Rule 3: the recommended (ε, γ, nβ) of a judged table, or None, and the finding in one sentence."""
    cells = table.to_dict("records")
    region = [cell for cell in cells if cell["insensitive"]]
    if not region:
        healthy = sum(bool(cell["healthy"]) for cell in cells)
        return None, (
            f"no region of insensitivity: {healthy} of {len(cells)} cells are healthy and none agrees with its neighbours"
        )
    best = min(region, key=lambda cell: (-cell["nbeta"], cell["mcse"] / abs(cell["llc"]) if cell["llc"] else math.inf))
    estimates = [cell["llc"] for cell in region]
    return (best["epsilon"], best["gamma"], best["nbeta"]), (
        f"{len(region)} of {len(cells)} cells are insensitive, with estimates from {min(estimates):.3g} to "
        f"{max(estimates):.3g}; recommended: epsilon {best['epsilon']:g}, gamma {best['gamma']:g}, "
        f"nbeta {best['nbeta']:g}, where the estimate is {best['llc']:.3g} ± {best['mcse']:.2g}"
    )


def _trace(cell: dict[str, float], result: LLCResult) -> pd.DataFrame:
    """The cell's traces, one row per chain and draw."""
    chains, draws = result.loss_trace.shape
    index = pd.MultiIndex.from_product([range(chains), range(draws)], names=["chain", "draw"])
    values = {"loss": result.loss_trace.flatten().tolist(), "running": result.running.flatten().tolist()}
    return pd.DataFrame(values, index=index).reset_index().assign(**cell)
