"""Structural collapse: spectra of the embeddings, layer-norm gains, and the unembedding (arXiv 2402.02364, section 4
and appendix).

In the stage in which in-context learning is acquired, the spectra of the token and position embeddings collapse to fewer
directions. Later the gains of the final layer norm, then those of the earlier ones, shrink until most coordinates are nearly
zero.

Shapes: C channels, D task dimension, T tokens. Weights are in the layout of `icl.model`. So the columns of both embeddings,
(C, D+1) and (C, T), are vectors of the residual stream.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from icl.analysis.data import AnalysisData
from icl.model import InContextRegressionTransformer

Array = NDArray[np.float64]

OFF = 0.1
"""A norm gain below this magnitude counts as off."""


def spectrum(matrix: ArrayLike) -> Array:
    """Singular values, descending, of a matrix. It is not centred."""
    return np.linalg.svd(np.asarray(matrix, dtype=float), compute_uv=False)


def normalised_spectrum(matrix: ArrayLike) -> Array:
    """Shares σ_i² / Σσ² of the squared Frobenius norm."""
    squares = spectrum(matrix) ** 2
    return squares / squares.sum()


def effective_rank(matrix: ArrayLike) -> float:
    """exp(H), where H is the entropy of σ_i²/Σσ² in nats. It lies between 1 and the rank (Roy & Vetterli 2007, here with squared
    singular values)."""
    shares = normalised_spectrum(matrix)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def subspace_alignment(vectors: ArrayLike, matrix: ArrayLike, rank: int | None = None) -> Array:
    """Share of each vector's length in the leading column space of a matrix, ‖U_r U_rᵀ e‖ / ‖e‖ in 0..1.

    Args:
        vectors: (C, n), columns e_1..e_n.
        matrix: (C, m).
        rank: number r of leading left singular vectors. None: the effective rank, rounded, because the full column space of a
            matrix with many columns contains almost every vector.
    """
    e, weights = np.asarray(vectors, dtype=float), np.asarray(matrix, dtype=float)
    kept = max(1, round(effective_rank(weights))) if rank is None else rank
    u = np.linalg.svd(weights, full_matrices=False)[0][:, :kept]
    return np.linalg.norm(u.T @ e, axis=0) / np.linalg.norm(e, axis=0)


def rotation_alignment(vectors: ArrayLike, matrix: ArrayLike) -> Array:
    """|cos(U e_i, e_i)|, where U is the full square matrix of left singular vectors. It is what the reference code's figure shows.

    It does not measure alignment. U rotates the standard basis onto the singular vectors, so the number depends on the basis
    of the residual stream and, for m < C, on arbitrary null vectors. It exists only for comparison with the published figure.
    Use `subspace_alignment`.
    """
    e = np.asarray(vectors, dtype=float)
    u = np.linalg.svd(np.asarray(matrix, dtype=float), full_matrices=True)[0]
    return np.abs((e * (u @ e)).sum(axis=0)) / (e**2).sum(axis=0)


def embedding_spectra(parameters: Mapping[str, Tensor]) -> pd.DataFrame:
    """Spectra of both embeddings as one row.

    Columns, for X = `embed` (W_E, (C, D+1)) and X = `postn` (W_P, (C, T)): `X/S/i` (singular values), `X/S_normed/i`
    (σ_i²/Σσ²), `X/trace` (Σσ²), `X/effective_rank`. For each column e_i of W_E: `alignment/i` (`subspace_alignment` with W_P)
    and `cossim/i` (`rotation_alignment`, as published).
    """
    embed, postn = _array(parameters, "token_embedding.weight"), _array(parameters, "position_embedding.weight")
    row: dict[str, float] = {}
    for name, matrix in (("embed", embed), ("postn", postn)):
        values = spectrum(matrix)
        row |= {f"{name}/S/{i}": value for i, value in enumerate(values)}
        row |= {f"{name}/S_normed/{i}": value for i, value in enumerate(values**2 / (values**2).sum())}
        row |= {f"{name}/trace": (values**2).sum(), f"{name}/effective_rank": effective_rank(matrix)}
    row |= {f"alignment/{i}": value for i, value in enumerate(subspace_alignment(embed, postn))}
    row |= {f"cossim/{i}": value for i, value in enumerate(rotation_alignment(embed, postn))}
    return pd.DataFrame([row])


def layer_norm_coordinates(parameters: Mapping[str, Tensor]) -> pd.DataFrame:
    """Every coordinate of every layer norm, and the row of the unembedding that makes the prediction.

    Columns: `layer` ("blocks.0.attention_norm", ..., "final_norm", "unembedding", "effective"), `parameter` ("weight"
    or "bias"), `index`, `value`. The layer "unembedding" is row 0 of W_U and of b_U. The layer "effective" is the final norm and
    the unembedding together: weight W_U[0] ⊙ γ and bias W_U[0]·β + b_U[0], where γ and β are those of the final norm. A model
    without layer norms has only the layer "unembedding".
    """
    coordinates = {name: _array(parameters, name) for name in parameters if "norm." in name}
    weight, bias = _array(parameters, "unembedding.weight")[0], _array(parameters, "unembedding.bias")[:1]
    coordinates |= {"unembedding.weight": weight, "unembedding.bias": bias}
    if "final_norm.weight" in parameters:
        gain, shift = coordinates["final_norm.weight"], coordinates["final_norm.bias"]
        coordinates |= {"effective.weight": weight * gain, "effective.bias": bias + weight @ shift}
    parts = []
    for name, values in coordinates.items():
        layer, parameter = name.rsplit(".", 1)
        parts.append(
            pd.DataFrame({"layer": layer, "parameter": parameter, "index": np.arange(values.size), "value": values})
        )
    return pd.concat(parts, ignore_index=True)


def layer_norm_statistics(coordinates: pd.DataFrame) -> pd.DataFrame:
    """Statistics of `layer_norm_coordinates` over `index`, for each layer, parameter and further column (such as model_seed, step).

    Columns: `norm` (‖v‖), `norm_std` (standard deviation of |v|), `mean`, `std`, `min`, `max`, and `share_off`, the
    share with |v| < 0.1. Standard deviations have the divisor n.
    """
    keys = [column for column in coordinates.columns if column not in ("index", "value")]
    values = coordinates.assign(magnitude=coordinates["value"].abs(), square=coordinates["value"] ** 2)
    grouped = values.assign(off=values["magnitude"] < OFF).groupby(keys, sort=False)
    return pd.DataFrame(
        {
            "norm": np.sqrt(np.asarray(grouped["square"].sum())),
            "norm_std": grouped["magnitude"].std(ddof=0),
            "mean": grouped["value"].mean(),
            "std": grouped["value"].std(ddof=0),
            "min": grouped["value"].min(),
            "max": grouped["value"].max(),
            "share_off": grouped["off"].mean(),
        }
    ).reset_index()


def _array(parameters: Mapping[str, Tensor], name: str) -> Array:
    return parameters[name].detach().to("cpu").double().numpy()


def measure_spectra(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: `embedding_spectra`."""
    return embedding_spectra(dict(model.named_parameters()))


def measure_layer_norm(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per coordinate: `layer_norm_coordinates`."""
    return layer_norm_coordinates(dict(model.named_parameters()))
