"""Essential dynamics: principal components of a trajectory of functions or weights (arXiv 2402.02364, section 4 and
its appendix).

Row t of the matrix is what checkpoint t looks like: the outputs on a fixed batch ("functional"), the weights, or a
gradient. PCA without scaling of the column-centred N × P matrix X: X - 1μᵀ = U S Vᵀ, scores U S, explained variance
S²/(N-1), shares S²/ΣS².

With few rows and many columns (5000 checkpoints × 81,920 outputs) the N × N Gram matrix of the centred rows holds all
that is needed: its eigenvalues are S² and its eigenvectors U. It is accumulated over blocks of columns, so that only
N² numbers and one block are in memory, and the rows may stay in a float16 file. With more rows than columns the P × P
matrix XᵀX takes its place, whose eigenvectors are V.

Shapes: N checkpoints, P features, V components.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh

from icl.storage.files import replacing

Array = NDArray[np.float64]

NUM_EQUAL_STEPS = 5000
"""Checkpoints of the published trajectory, at equal distances."""


@dataclass(frozen=True)
class TrajectoryPCA:
    """Principal components of a trajectory.

    Attributes:
        mean: (P,) the column means.
        components: (V, P), orthonormal rows; the sign makes the entry of largest magnitude of each positive.
        explained_variance_ratio: (V,) shares of the total variance.
        total_variance: of the rows, with the divisor N - 1.
        scores: (N, V) the rows' coordinates.
    """

    mean: Array
    components: Array
    explained_variance_ratio: Array
    total_variance: float
    scores: Array

    def transform(self, rows: ArrayLike, block: int = 4096) -> Array:
        """Coordinates (N', V) of other rows (N', P), such as another seed's trajectory or reference functions."""
        matrix = np.asanyarray(rows)
        if matrix.ndim != 2 or matrix.shape[1] != self.mean.size:
            raise ValueError(f"expected rows of {self.mean.size} features, got {matrix.shape}")
        projected = np.zeros((len(matrix), len(self.components)))
        for columns in _blocks(self.mean.size, block):
            projected += (matrix[:, columns] - self.mean[columns]) @ self.components[:, columns].T
        return projected


def pca(rows: ArrayLike, num_components: int, block: int = 4096) -> TrajectoryPCA:
    """PCA of a trajectory (N, P), an array or a memory-mapped file of any float type, in blocks of columns.

    With n the smaller and m the larger of N and P, it takes about n² + 2·n·block numbers of memory besides `rows`, and the
    time of n²·m multiplications, in float32 where the rows are no wider than that.

    Raises:
        ValueError: fewer than two rows, components that cannot exist, or numbers that are not finite.
    """
    matrix = np.asanyarray(rows)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise ValueError(f"expected at least two rows (N, P), got {matrix.shape}")
    num, size = matrix.shape
    if not 1 <= num_components <= min(num, size):
        raise ValueError(f"num_components must lie in 1..{min(num, size)}, got {num_components}")
    if num > size:
        return _pca_by_covariance(matrix, num_components, block)
    mean, gram = _centred_gram(matrix, block)
    values, vectors = eigh(gram, subset_by_index=(num - num_components, num - 1))
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    total = float(np.trace(gram))
    components = np.empty((num_components, size))
    scale = np.where(values > _negligible(matrix, total), 1 / np.sqrt(np.maximum(values, np.finfo(float).tiny)), 0.0)
    for columns in _blocks(size, block):
        components[:, columns] = (vectors.T @ (matrix[:, columns] - mean[columns])) * scale[:, None]
    largest = np.argmax(np.abs(components), axis=1)
    signs = np.where(components[np.arange(num_components), largest] < 0, -1.0, 1.0)
    return TrajectoryPCA(
        mean=mean,
        components=components * signs[:, None],
        explained_variance_ratio=values / total if total > 0 else np.zeros(num_components),
        total_variance=total / (num - 1),
        scores=vectors * np.sqrt(values) * signs,
    )


def _pca_by_covariance(matrix: NDArray[np.floating], num_components: int, block: int) -> TrajectoryPCA:
    """`pca` of more rows than columns, in blocks of rows."""
    num, size = matrix.shape
    working = _working_type(matrix)
    blocks = _blocks(num, block)
    mean = sum((np.asarray(matrix[rows], dtype=float).sum(axis=0) for rows in blocks), np.zeros(size)) / num
    products = np.zeros((size, size))
    for rows in blocks:
        centred = (np.asarray(matrix[rows], dtype=float) - mean).astype(working)
        products += centred.T @ centred
    if not np.isfinite(products).all():
        raise ValueError("the trajectory holds values that are not finite")
    values, vectors = eigh(products, subset_by_index=(size - num_components, size - 1))
    values, components = np.clip(values[::-1], 0, None), vectors[:, ::-1].T
    largest = np.argmax(np.abs(components), axis=1)
    components = components * np.where(components[np.arange(num_components), largest] < 0, -1.0, 1.0)[:, None]
    total = float(np.trace(products))
    components[values <= _negligible(matrix, total)] = 0
    scores = [(np.asarray(matrix[rows], dtype=float) - mean) @ components.T for rows in blocks]
    return TrajectoryPCA(
        mean=mean,
        components=components,
        explained_variance_ratio=values / total if total > 0 else np.zeros(num_components),
        total_variance=total / (num - 1),
        scores=np.concatenate(scores),
    )


def trajectory_table(steps: ArrayLike, scores: ArrayLike, **labels: object) -> pd.DataFrame:
    """Scores (N, V) as one row per checkpoint: the labels, `step`, `pc/0`, `pc/1`, ..."""
    coordinates = np.asarray(scores)
    table = pd.DataFrame({"step": np.asarray(steps)}).assign(**labels)  # type: ignore[arg-type]
    return table.assign(**{f"pc/{i}": coordinates[:, i] for i in range(coordinates.shape[1])})


def write_rows(path: Path, rows: Iterable[ArrayLike], num: int, dtype: str = "float16") -> np.memmap:
    """Write N = num rows of P features, one at a time, to an `.npy` file and return it memory-mapped, read-only.

    float16 halves the file and rounds each number by at most 2^-11 of itself, far below the differences between
    checkpoints. The file appears under its name only when all rows are there.

    Raises:
        ValueError: rows of different sizes, a number of rows that differs, or a value beyond the type's range.
    """
    size, written = 0, 0
    with replacing(path) as file:
        for row in rows:
            with np.errstate(over="ignore"):
                values = np.asarray(row).reshape(-1).astype(dtype)
            if written == 0:
                size = values.size
                head = {"descr": values.dtype.str, "fortran_order": False, "shape": (num, size)}
                np.lib.format.write_array_header_1_0(file, head)
            if written == num or values.size != size:
                raise ValueError(f"row {written} has {values.size} features; expected {num} rows of {size}")
            if not np.isfinite(values).all():
                raise ValueError(f"row {written} holds values that {dtype} cannot: store the trajectory as float32")
            file.write(values.tobytes())
            written += 1
        if written != num:
            raise ValueError(f"got {written} rows, expected {num}")
    return np.load(path, mmap_mode="r")


def _centred_gram(matrix: NDArray[np.floating], block: int) -> tuple[Array, Array]:
    """Column means (P,) and the Gram matrix (N, N) of the centred rows."""
    num, size = matrix.shape
    working = _working_type(matrix)
    mean = np.empty(size)
    gram = np.zeros((num, num))
    for columns in _blocks(size, block):
        part = np.asarray(matrix[:, columns], dtype=np.float64)
        mean[columns] = part.mean(axis=0)
        # Centred before the product, not after: the mean is far larger than the differences that matter.
        centred = (part - mean[columns]).astype(working)
        gram += centred @ centred.T
    if not np.isfinite(gram).all():
        raise ValueError("the trajectory holds values that are not finite")
    return mean, gram


def _negligible(matrix: NDArray[np.floating], total: float) -> float:
    """Rows that vary in fewer directions than were asked for have eigenvalues below this; their components are zero, not noise."""
    return float(max(matrix.shape) * np.finfo(np.float32).eps ** 2 * max(total, np.finfo(float).tiny))


def _working_type(matrix: NDArray[np.floating]) -> type[np.floating]:
    """Of products of rows: no wider than the rows need."""
    return np.float64 if matrix.dtype == np.float64 or not np.issubdtype(matrix.dtype, np.floating) else np.float32


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]
