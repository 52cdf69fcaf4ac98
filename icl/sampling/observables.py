r"""Recorders that use bounded memory: weight traces and the singular fluctuation.

Each is a recorder for `estimate_llc(recorders=...)`: called with (draw, weights (E, P), chain indices (E,)) at every draw.

Shapes: E chains, N draws, P sampled parameters, S samples.
"""

import torch
from torch import Tensor

from icl.sampling.objective import Batch, Losses


class WeightTrace:
    """w − w* at the draws in float32. Draws are thinned evenly so that the trace fits into memory.

    Args:
        num_chains, num_draws: of the run.
        anchor: w* (P,).
        max_bytes: what the trace may occupy; every k-th draw is kept with the smallest k that fits.

    Raises:
        ValueError: not even two draws per chain fit.
    """

    def __init__(self, num_chains: int, num_draws: int, anchor: Tensor, max_bytes: int = 2**30) -> None:
        per_draw = 4 * num_chains * anchor.numel()
        fitting = max_bytes // per_draw
        if fitting < 2:
            raise ValueError(
                f"two draws of {num_chains} chains need {2 * per_draw} bytes, more than max_bytes={max_bytes}; raise it"
            )
        self.every = -(-num_draws // fitting)
        self._anchor = anchor
        self.deltas = torch.full((num_chains, -(-num_draws // self.every), anchor.numel()), torch.nan)
        """(E, kept draws, P)."""

    def __call__(self, draw: int, positions: Tensor, chains: Tensor) -> None:
        """Record one draw."""
        if draw % self.every == 0:
            self.deltas[chains, draw // self.every] = (positions - self._anchor).float().cpu()


class SingularFluctuation:
    r"""ν̂ = (nβ/2) mean_i Var_t ℓ_i(w_t): Watanabe's singular fluctuation β/2 Σ_i Var, with ℓ_i the loss of sample i of a fixed batch.

    Variances are taken within each chain and averaged over chains. For a regular model that realises the truth, ν = λ = d/2 when ℓ is the
    negative log-likelihood (Watanabe 2009, chapter 6).

    Args:
        samples: gives one loss per sample (S,): `ModuleObjective(model, per_sample_loss)`, or the transformer's `SequenceLosses`.
        batch: the fixed evaluation data.
        num_chains: of the run.
    """

    def __init__(self, samples: Losses, batch: Batch, num_chains: int) -> None:
        self._samples, self._batch = samples, batch
        size = samples.losses(samples.anchor[None], batch).shape[1]
        self._count = torch.zeros(num_chains, 1, dtype=torch.float64)
        self._mean = torch.zeros(num_chains, size, dtype=torch.float64)
        self._squares = torch.zeros(num_chains, size, dtype=torch.float64)

    def __call__(self, draw: int, positions: Tensor, chains: Tensor) -> None:
        """Add one draw of every chain (Welford's update)."""
        losses = self._samples.losses(positions, self._batch).double().cpu()
        self._count[chains] += 1
        difference = losses - self._mean[chains]
        self._mean[chains] += difference / self._count[chains]
        self._squares[chains] += difference * (losses - self._mean[chains])

    def estimate(self, nbeta: float) -> float:
        """ν̂ over the chains that stayed finite."""
        variances = (self._squares / (self._count - 1)).mean(dim=1)
        return float(nbeta / 2 * variances[torch.isfinite(variances)].mean())
