r"""What else to take from chains, at bounded memory: weight traces with their principal components, covariances, singular fluctuation.

Each is a recorder for `estimate_llc(recorders=...)`: called with (draw, weights (E, P), chain indices (E,)) at every draw.

Shapes: E chains, N draws, P sampled parameters, S samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.sampling.objective import Batch, Objective


@dataclass(frozen=True)
class PrincipalComponents:
    """Components (k, P), the draws' coordinates in them (E, N, k), and the explained share of the variance (k,)."""

    components: Tensor
    coordinates: Tensor
    explained: Tensor


class WeightTrace:
    """w − w* at the draws, float32, thinned evenly so that it fits.

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

    def principal_components(self, count: int = 3) -> PrincipalComponents:
        """Principal components of all healthy chains' draws together.

        By the eigenvectors of the Gram matrix of draws when there are fewer draws than parameters, so that no P × P matrix is made.
        """
        healthy = torch.isfinite(self.deltas).all(dim=-1).all(dim=-1)
        points = self.deltas[healthy].flatten(0, 1)
        centred = points - points.mean(dim=0)
        if len(points) <= points.shape[1]:
            values, vectors = torch.linalg.eigh((centred @ centred.T).double())
            components = (vectors[:, -count:].T.float() @ centred).flip(0)
            components = components / components.norm(dim=1, keepdim=True)
        else:
            values, vectors = torch.linalg.eigh((centred.T @ centred).double())
            components = vectors[:, -count:].T.float().flip(0)
        explained = (values[-count:].flip(0) / values.clamp(min=0).sum()).float()
        return PrincipalComponents(components, self.deltas @ components.T, explained)


class GroupCovariance:
    """Covariances of groups of parameters over all draws, and between pairs of groups, as running moments.

    Args:
        groups: name -> indices into the sampled parameters.
        pairs: pairs of group names; (a, a) is a group's own covariance.

    Memory: the sum over pairs of the product of their sizes, in float64.
    """

    def __init__(self, anchor: Tensor, groups: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> None:
        self._anchor, self._groups, self._pairs = anchor, dict(groups), list(pairs)
        self._count = 0
        self._sums = {name: torch.zeros(len(index), dtype=torch.float64) for name, index in self._groups.items()}
        self._products = {
            (a, b): torch.zeros(len(groups[a]), len(groups[b]), dtype=torch.float64) for a, b in self._pairs
        }

    def __call__(self, draw: int, positions: Tensor, chains: Tensor) -> None:
        """Add one draw of every chain."""
        # Moments about w* rather than 0: the covariance is small beside the weights' squares.
        deltas = (positions - self._anchor).double().cpu()
        parts = {name: deltas[:, index] for name, index in self._groups.items()}
        self._count += len(deltas)
        for name, part in parts.items():
            self._sums[name] += part.sum(dim=0)
        for a, b in self._pairs:
            self._products[a, b] += parts[a].T @ parts[b]

    def covariance(self, first: str, second: str) -> Tensor:
        """E[a bᵀ] − E[a] E[b]ᵀ."""
        means = self._sums[first][:, None] * self._sums[second][None] / self._count**2
        return self._products[first, second] / self._count - means

    def leading(self, first: str, second: str, count: int = 5) -> Tensor:
        """The largest eigenvalues of a group's own covariance, descending; singular values between two groups, where no
        eigenvalues exist."""
        covariance = self.covariance(first, second)
        values = torch.linalg.eigvalsh(covariance) if first == second else torch.linalg.svdvals(covariance)
        return values.sort(descending=True).values[:count]


class SingularFluctuation:
    r"""ν̂ = (nβ/2) mean_i Var_t ℓ_i(w_t): Watanabe's singular fluctuation β/2 Σ_i Var, with ℓ_i the loss of sample i of a fixed batch.

    Variances are taken within each chain and averaged over chains. For a regular model that realises the truth, ν = λ = d/2 when ℓ is the
    negative log-likelihood (Watanabe 2009, chapter 6).

    Args:
        samples: an objective that gives one loss per sample (S,): `ModuleObjective(model, per_sample_loss)`.
        batch: the fixed evaluation data.
        num_chains: of the run.
    """

    def __init__(self, samples: Objective, batch: Batch, num_chains: int) -> None:
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
