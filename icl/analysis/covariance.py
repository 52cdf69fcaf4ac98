"""Covariance of SGLD draws of the weights, and their principal components.

Cov(u, v) = E[u vᵀ] - E[u] E[v]ᵀ, where E is the mean over all chains and draws. The covariance of a group of weights with
itself has eigenvalues. That of two different groups is a rectangular matrix, so its singular values are taken instead.

Shapes: N draws, P parameters; n and m the sizes of two groups of weights.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from icl.analysis.essential_dynamics import TrajectoryPCA, pca
from icl.analysis.weight_groups import WeightGroup, entries_of

Array = NDArray[np.float64]


def covariance_spectrum(
    left: ArrayLike, right: ArrayLike | None = None, num_values: int = 3
) -> tuple[Array, Array, Array]:
    """Leading singular triples of the covariance of draws (N, n) and (N, m), without forming the n × m matrix.

    Let U = Q_u R_u be the QR decomposition of the transposed, centred draws. Then Cov = Q_u (R_u R_vᵀ / N) Q_vᵀ, and the small
    inner matrix has the same singular values. If `right` is None, the covariance is symmetric, and its eigenvalues and
    eigenvectors are returned.

    Returns:
        Values (k,), descending, left vectors (n, k) and right vectors (m, k), with k = min(num_values, n, m, N). Signs are
        such that the entry of largest magnitude of each left vector is positive.

    Raises:
        ValueError: the draws are not two matrices with the same number of rows.
    """
    u = np.asarray(left, dtype=float)
    v = u if right is None else np.asarray(right, dtype=float)
    if u.ndim != 2 or v.ndim != 2 or len(u) != len(v) or not len(u):
        raise ValueError(f"expected draws (N, n) and (N, m) with N >= 1, got {u.shape} and {v.shape}")
    q_u, r_u = np.linalg.qr((u - u.mean(axis=0)).T)
    q_v, r_v = (q_u, r_u) if right is None else np.linalg.qr((v - v.mean(axis=0)).T)
    inner = r_u @ r_v.T / len(u)
    if right is None:
        values, vectors = np.linalg.eigh((inner + inner.T) / 2)
        values, a = values[::-1], vectors[:, ::-1]
        b = a
    else:
        a, values, b_transposed = np.linalg.svd(inner)
        b = b_transposed.T
    k = min(num_values, values.size)
    left_vectors = np.matmul(q_u, a[:, :k], dtype=np.float64)
    right_vectors = np.matmul(q_v, b[:, :k], dtype=np.float64)
    largest = np.argmax(np.abs(left_vectors), axis=0)
    signs: Array = np.where(left_vectors[largest, np.arange(k)] < 0, -1.0, 1.0)
    return values[:k], left_vectors * signs, right_vectors * signs


def covariance_table(
    draws: ArrayLike, pairs: Iterable[tuple[WeightGroup, WeightGroup]], num_values: int = 3
) -> pd.DataFrame:
    """Leading values of the covariance of pairs of weight groups over flat draws (N, P).

    One row per pair and value: `left`, `right` (names), `kind` ("eigenvalue" for a group with itself, otherwise "singular
    value"), `index`, `value` (in squared units of weights), and `trace`, the sum of all eigenvalues (NaN for two groups).
    """
    flat = np.asarray(draws)
    rows = []
    for left, right in pairs:
        same = left.name == right.name
        u = entries_of(flat, left)
        values, _, _ = covariance_spectrum(u, None if same else entries_of(flat, right), num_values)
        trace = float(np.var(np.asarray(u, dtype=float), axis=0).sum()) if same else np.nan
        kind = "eigenvalue" if same else "singular value"
        rows += [(left.name, right.name, kind, index, value, trace) for index, value in enumerate(values)]
    return pd.DataFrame(rows, columns=pd.Index(["left", "right", "kind", "index", "value", "trace"]))


def weight_pca(deltas: ArrayLike, num_components: int = 3) -> tuple[TrajectoryPCA, pd.DataFrame]:
    """Principal components of chain deltas w - w₀ of shape (chains, draws, P).

    Returns:
        The PCA of all draws of all chains, and its scores as a table: `chain`, `draw`, `pc/0`, `pc/1`, ...
    """
    weights = np.asarray(deltas)
    if weights.ndim != 3:
        raise ValueError(f"expected deltas (chains, draws, P), got {weights.shape}")
    chains, draws, size = weights.shape
    fitted = pca(weights.reshape(-1, size), num_components)
    table = pd.DataFrame({"chain": np.repeat(np.arange(chains), draws), "draw": np.tile(np.arange(draws), chains)})
    scores = {f"pc/{i}": fitted.scores[:, i] for i in range(fitted.scores.shape[1])}
    return fitted, table.assign(**scores)
