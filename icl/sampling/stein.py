r"""Tests whether the chains sample their target density exp(−U), with U = nβ L + (γ/2)‖w − w*‖².

For any smooth field v, a chain that samples exp(−U) obeys E[v·∇U] = E[div v] (Stein 1972). Two fields are used:

- v = w − w*: the **virial** E[(w − w*)·∇U] = P. It weighs all directions alike. So it shows directions that have not been explored (a
  value below 1). It hardly shows the few stiff directions of a large model.
- v = ∇L: the **stiff** identity E[∇L_b·∇U_b′] = E[tr ∇²L], with independent batches b and b′ and the trace by one random probe. It weighs
  the stiff directions, which decide λ̂. It shows a step that is too long, noise of mini-batches, a wrong temperature, or a bounding box.

The tests always use gradients with their control variate (`icl.sampling.control`), even if the chain itself does not. The two factors use
independent halves of ḡ. Both ratios are 1 for the target. They are only tests. Do not divide λ̂ by them: in singular models the error of λ̂
can differ from theirs.

Shapes: E chains, P sampled parameters, D tested draws.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from icl.sampling.diagnostics import BATCHES, FEW_CHAINS, student_factor
from icl.sampling.pieces import added, pieces
from icl.streams import Stream

if TYPE_CHECKING:
    from icl.sampling.plan import Plan, StepData

SHARE = 0.18
"""The tests take at most this share of the number of gradients that the chains take."""


class TestTerms(NamedTuple):
    """One draw of every chain (E,)."""

    stiff: Tensor
    """∇L_b·∇U_b′"""
    trace: Tensor
    """z·(∇²L) z for random signs z, whose mean is the trace"""
    virial: Tensor
    """(w − w*)·∇U / P"""
    temperature: Tensor
    """kinetic temperature; NaN for a kernel without momentum"""
    at_box: Tensor
    """share of coordinates at the wall of the bounding box"""
    pairing: Tensor
    """nβ (g_b(w*) − ḡ)·(w − w*) on the batch of the draw: what its noise adds to a paired difference of losses"""


class Ratio(NamedTuple):
    """An estimate with its standard error, usually of a ratio that is 1 for the target."""

    value: float
    error: float


UNKNOWN = Ratio(math.nan, math.nan)


def stride_for(chains: int, constant: bool) -> int:
    """The number of draws for each tested draw, such that tests take at most SHARE of the gradients.

    On mini-batches a test takes two gradients of every chain, and two of w* that all chains share. On data that never change it takes one
    of every chain.
    """
    cost = 1.0 if constant else 2.0 + 2.0 / chains
    return max(10, math.ceil(cost / SHARE))


def test_terms(
    plan: "Plan",
    data: "StepData",
    after: "StepData",
    state: Any,
    gradient: Tensor,
    draw: int,
    seeds: Sequence[int],
    temperature: Callable[[Any], Tensor] | None,
) -> TestTerms:
    """The terms at one draw.

    Args:
        data, after: the batches of this step and of another.
        state: of the chains, at which `gradient` (E, P) was taken on `data`.
        seeds: of the chains; each chain's random probes are a stream of its own.
    """
    config, position = plan.config, state.position
    assert plan.mean is not None
    mean, nbeta, box = plan.mean, config.inverse_temperature, config.bounding_box_size
    width = _WIDTHS.get(position.dtype, 1e-2) / math.sqrt(max(nbeta, 1.0))
    signs = _probe(seeds, draw, position)
    shifted = torch.empty_like(position)
    for place in pieces(position):
        torch.add(position[:, place], signs(place.start, place.stop), alpha=width, out=shifted[:, place])
    shifted = data.losses_and_gradients(shifted, None, out=shifted)[1]
    other = gradient if after is data else after.losses_and_gradients(position, None)[1]

    def of_piece(place: slice) -> dict[str, Tensor]:
        away = position[:, place] - data.of_each_chain(plan.anchors[:, place])
        first, second = (data.of_each_chain(half[:, place]) for half in mean.halves)
        own = data.anchor_gradients(place)
        here = gradient[:, place]
        loss_gradient = here - own + first
        theirs = loss_gradient if after is data else other[:, place] - after.anchor_gradients(place) + second
        force = nbeta * theirs + config.localization * away
        noise = own - data.of_each_chain(mean.whole[:, place])
        return {
            "stiff": (loss_gradient * force).sum(dim=-1),
            "trace": (signs(place.start, place.stop) * (shifted[:, place] - here)).sum(dim=-1),
            "virial": (away * force).sum(dim=-1),
            "pairing": (noise * away).sum(dim=-1),
            "at_box": away.new_zeros(len(away))
            if box is None
            else (away.abs() >= box * (1 - 1e-6)).to(away).sum(dim=-1),
        }

    sums = added(of_piece(place) for place in pieces(position))
    count = position.shape[1]
    return TestTerms(
        stiff=sums["stiff"],
        trace=sums["trace"] / width,
        virial=sums["virial"] / count,
        temperature=torch.full_like(sums["stiff"], torch.nan) if temperature is None else temperature(state),
        at_box=sums["at_box"] / count,
        pairing=nbeta * sums["pairing"],
    )


_WIDTHS = {torch.float64: 1e-3}


def _probe(seeds: Sequence[int], draw: int, like: Tensor) -> Callable[[int, int], Tensor]:
    """(start, stop) -> random signs (E, stop − start), each chain's from a stream of its own.

    Those of a short vector are kept. Those of a long one are made at each use, which is as fast.
    """
    streams = [Stream(seed, "chain/probe") for seed in seeds]

    @lru_cache(maxsize=1)
    def signs(start: int, stop: int) -> Tensor:
        return torch.stack([each.signs(draw, stop - start, like.device, start) for each in streams]).to(like)

    return signs


def stiff_ratio(stiff: Tensor, trace: Tensor) -> Ratio:
    """E[∇L·∇U] / E[tr ∇²L] from terms (E, D); NaN where the trace is not clearly positive."""
    stiff, trace = stiff.double(), trace.double()
    if stiff.numel() == 0 or not float(trace.mean()) > 3 * _error(trace):
        return UNKNOWN
    ratio = float(stiff.mean() / trace.mean())
    return Ratio(ratio, _error(stiff - ratio * trace) / float(trace.mean()))


def held_share(excess: Tensor, trace: Tensor, nbeta: float, gamma: float) -> Ratio:
    r"""The share 2γ λ̂ / (nβ E[tr ∇²L]): how much the localisation, instead of the loss, holds the chains.

    In a quadratic loss of curvatures d/nβ the share is Σ d/(d + γ) · γ / Σ d, the mean of γ/(d + γ) weighted by d. It is 1 if the
    localisation holds every direction. −dλ̂/d log γ is λ̂ times the same mean weighted by d/(d + γ), which gives soft directions more
    weight. So this share is a lower bound of that sensitivity in units of λ̂, and its noise is far lower.

    Args:
        excess: (E, N), nβ(L − L(w*)).
        trace: (E, D), the traces; the result is NaN if their mean is not clearly positive.
    """
    excess, trace = excess.double(), trace.double()
    if nbeta == 0 or trace.numel() == 0 or not float(trace.mean()) > 3 * _error(trace):
        return UNKNOWN
    mean, curvature = float(excess.mean()), float(trace.mean())
    share = 2 * gamma * mean / (nbeta * curvature)
    return Ratio(share, abs(share) * math.hypot(_error(excess) / mean, _error(trace) / curvature) if mean else math.nan)


def mean_ratio(terms: Tensor) -> Ratio:
    """The mean of terms (E, D) with its error."""
    terms = terms.double()
    if terms.numel() == 0:
        return UNKNOWN
    return Ratio(float(terms.mean()), _error(terms))


def _error(terms: Tensor) -> float:
    """Standard error of the mean of terms (E, D), between chains, or between stretches of few chains; see `mcse_of_mean`."""
    chains, count = terms.shape
    if chains < FEW_CHAINS:
        pieces = -(-BATCHES // chains)
        if count < pieces:
            return math.nan
        terms = torch.cat([part.mean(dim=1, keepdim=True) for part in terms.tensor_split(pieces, dim=1)]).reshape(-1, 1)
    means = terms.mean(dim=1)
    return float(means.std()) / math.sqrt(len(means)) * student_factor(len(means) - 1)
