"""The online estimator of the published language model, with its artefact.

That estimator takes L(w*) as the mean over all C chains of their first loss. It keeps those losses in an array of zeros, and its chains run
one after the other. So chain c, counted from 0, sees

    L̂_c = (1/C) Σ_{c' ≤ c} ℓ_{c', 0}        and        λ̂_c = (nβ/N) Σ_{t ≥ 1} (ℓ_{c, t} − L̂_c),

about (c + 1)/C of the true loss. Where every chain's first loss is L = L(w*), this adds nβ (1 − (c + 1)/C) (N − 1)/N L to the estimate
of chain c. Nearly all of the spread over chains in the published tables is this artefact (docs/language.md).

Shapes: C chains, N draws, T losses of one batch.
"""

import math

import torch
from torch import Tensor


def online_excess(losses: Tensor) -> Tensor:
    """The terms (C, N, T) that the estimator averages over draws, in units of 1/nβ.

    Args:
        losses: (C, N, T), the chains in the order they ran.
    """
    known = losses[:, 0].cumsum(dim=0) / len(losses)
    excess = losses - known[:, None]
    return torch.cat((torch.zeros_like(excess[:, :1]), excess[:, 1:]), dim=1)


def artefact(nbeta: float, chains: int, draws: int, loss: float) -> tuple[float, float]:
    """The artefact's effect on λ̂: (shift of the mean over chains, standard deviation over chains).

    The shift is nβ (1 − (C + 1)/2C) (N − 1)/N L. The standard deviation that the artefact alone makes is nβ √((C + 1)/12C) (N − 1)/N L.
    With C = 20, N = 200 and nβ = 100/log 100 these are 10.26 L and 6.39 L.
    """
    scale = nbeta * (draws - 1) / draws * loss
    return scale * (1 - (chains + 1) / (2 * chains)), scale * math.sqrt((chains + 1) / (12 * chains))
