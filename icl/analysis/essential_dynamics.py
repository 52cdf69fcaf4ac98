"""Essential dynamics: principal components of a trajectory of functions or weights (arXiv 2402.02364, section 4 and
appendix).

Row t of the N × P matrix X describes checkpoint t: by its outputs on a fixed batch ("functional"), by its weights, or by a
gradient. The PCA centres the columns and does not scale them: X - 1μᵀ = U S Vᵀ. The scores are U S, the explained variances
S²/(N-1), and the shares S²/ΣS².

If there are few rows and many columns (such as 5000 checkpoints × 81,920 outputs), the N × N Gram matrix of the centred
rows suffices: its eigenvalues are S² and its eigenvectors U. It is summed over blocks of columns, so only N² numbers and
one block are in memory, and the rows may stay in a float16 file. If there are more rows than columns, the P × P matrix of
products of the centred columns is used instead; its eigenvectors are V.

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
"""The number of checkpoints of the published trajectory, equally spaced in steps."""


@dataclass(frozen=True)
class TrajectoryPCA:
    """Principal components of a trajectory.

    Attributes:
        mean: (P,) the column means.
        components: (V, P), orthonormal rows. The entry of largest magnitude of each row is positive.
        explained_variance_ratio: (V,) shares of the total variance.
        total_variance: total variance of the rows, with divisor N - 1.
        scores: (N, V) coordinates of the rows.
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
    """PCA of a trajectory (N, P), which is an array or a memory-mapped file of any float type.

    Let n be the smaller and m the larger of N and P. Then it needs memory for about n² + 2·n·block numbers in addition to
    `rows`, and the time of n²·m multiplications. These are in float32, unless the rows are in float64.

    Raises:
        ValueError: there are fewer than two rows, more components than rows or columns, or numbers that are not finite.
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
    """`pca` for more rows than columns, in blocks of rows."""
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
    """Write N = num rows of P features, one at a time, to an `.npy` file, and return it memory-mapped and read-only.

    float16 halves the size of the file. It changes a number by at most 2^-11 of itself, far less than checkpoints differ.
    The file is written atomically.

    Raises:
        ValueError: rows have different sizes, their number is not `num`, or a value is out of the type's range.
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
                raise ValueError(
                    f"row {written} holds values out of the range of {dtype}; store the trajectory as float32"
                )
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
        # Centred before the product, because the mean is far larger than the differences between rows.
        centred = (part - mean[columns]).astype(working)
        gram += centred @ centred.T
    if not np.isfinite(gram).all():
        raise ValueError("the trajectory holds values that are not finite")
    return mean, gram


def _negligible(matrix: NDArray[np.floating], total: float) -> float:
    """Eigenvalues below this are rounding errors: the rows vary in fewer directions. Their components are set to zero."""
    return float(max(matrix.shape) * np.finfo(np.float32).eps ** 2 * max(total, np.finfo(float).tiny))


def _working_type(matrix: NDArray[np.floating]) -> type[np.floating]:
    """The type for products of rows: float64 only if the rows need it."""
    return np.float64 if matrix.dtype == np.float64 or not np.issubdtype(matrix.dtype, np.floating) else np.float32


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]
