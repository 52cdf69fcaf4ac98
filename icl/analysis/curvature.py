r"""The spectrum of a Hessian too large to write down: sums Σ_i f(h_i) over its eigenvalues h_i, from products H v alone.

The k eigenvalues of largest magnitude are found by the Lanczos method. What is left, ΠHΠ with Π = I − QQᵀ, is measured by stochastic
Lanczos quadrature (Ubaru, Chen & Saad, SIAM Journal on Matrix Analysis and Applications 2017; Ghorbani, Krishnan & Xiao,
arXiv 1901.10159). For a random sign vector v, m steps of Lanczos from Πv give nodes θ_j and weights τ_j with

    vᵀ f(ΠHΠ) v ≈ ‖Πv‖² Σ_j τ_j f(θ_j),      exact for polynomials f of degree below 2m,

and the mean over v is Σ f(h_i) over the other directions. Taking out the large eigenvalues first removes most of the variance over v.

Shapes: P parameters, k eigenvalues, R probes, m nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icl.analysis.hessian import MatVec, top_eigenvalues
from icl.streams import Stream

Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class CurvatureSpectrum:
    """The eigenvalues of a Hessian: the largest one by one, the others as a distribution.

    Attributes:
        eigenvalues: (k,) those of largest magnitude.
        nodes: (R, m) where the distribution of the others has its mass, by each probe.
        weights: (R, m) the number of directions at each node; each row sums to P − k, up to the noise of its probe.
    """

    eigenvalues: NDArray[np.float64]
    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]

    def total(self, f: Function) -> tuple[float, float]:
        """Σ_i f(h_i) over all eigenvalues, and its standard error over probes (NaN for a single one).

        Args:
            f: elementwise; its value at 0 must be 0, or the many flat directions decide the sum.
        """
        rest = (self.weights * f(self.nodes)).sum(axis=1)
        error = float(np.std(rest, ddof=1) / np.sqrt(len(rest))) if len(rest) > 1 else float("nan")
        return float(f(self.eigenvalues).sum() + rest.mean()), error

    @property
    def lowest(self) -> float:
        """The most negative curvature met."""
        return float(min(self.eigenvalues.min(), self.nodes.min()))


def curvature_spectrum(
    product: MatVec, like: Tensor, k: int, num_probes: int, num_nodes: int, seed: int = 0
) -> CurvatureSpectrum:
    """The spectrum of H from about 3k + num_probes · num_nodes products.

    Args:
        product: v -> H v, H symmetric.
        like: a vector (P,) of the type and device that `product` takes.
        k: eigenvalues found one by one, below P.
        num_probes: R.
        num_nodes: m, at most P − k.
        seed: of the random vectors.
    """
    values, vectors = top_eigenvalues(product, like, k, tolerance=1e-2, seed=seed)
    directions = torch.linalg.qr(torch.as_tensor(vectors))[0].to(like)
    nodes, weights = [], []
    for probe in range(num_probes):
        signs = Stream(seed, "curvature/probe").signs(probe, like.numel(), like.device).to(like)
        start = signs - directions @ (directions.T @ signs)
        at, share = lanczos_quadrature(product, start, directions, num_nodes)
        nodes.append(at)
        weights.append(share * float(start.double().square().sum()))
    return CurvatureSpectrum(values, np.stack(nodes), np.stack(weights))


def lanczos_quadrature(
    product: MatVec, start: Tensor, without: Tensor, num_nodes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes (m,) and weights (m,), of sum 1, of the distribution of the eigenvalues of ΠHΠ in the direction `start`.

    Every new vector is made orthogonal to all before it and to `without`, so that no eigenvalue is met twice. If the directions that
    `start` reaches are exhausted, the other nodes have the weight 0.

    Args:
        product: v -> H v.
        start: (P,) orthogonal to `without`.
        without: orthonormal directions Q (P, k).
        num_nodes: m.
    """
    basis = start.new_zeros(num_nodes, start.numel())
    diagonal, beside = np.zeros(num_nodes), np.zeros(max(num_nodes - 1, 0))
    vector = start / start.norm()
    for step in range(num_nodes):
        basis[step] = vector
        image = product(vector)
        size = image.norm()
        diagonal[step] = float(vector @ image)
        for _ in range(2):  # once more, because rounding leaves a rest after the first time
            image = image - without @ (without.T @ image)
            image = image - basis[: step + 1].T @ (basis[: step + 1] @ image)
        rest = image.norm()
        if step + 1 == num_nodes or not rest > 1e-6 * size:
            break
        beside[step] = float(rest)
        vector = image / rest
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    return values, vectors[0] ** 2
