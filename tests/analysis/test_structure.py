import numpy as np
import pandas as pd
import pytest
import torch

from icl.analysis.structure import (
    effective_rank,
    embedding_spectra,
    layer_norm_coordinates,
    layer_norm_statistics,
    normalised_spectrum,
    rotation_alignment,
    spectrum,
    subspace_alignment,
)
from icl.model import InContextRegressionTransformer

RNG = np.random.default_rng(0)
MODEL = InContextRegressionTransformer(3, 5, embed_size=14, mlp_size=7, num_heads=2, num_layers=2, seed=1)
PARAMETERS = dict(MODEL.named_parameters())


def test_spectrum_of_a_known_matrix():
    matrix = np.linalg.qr(RNG.normal(size=(7, 3)))[0] * [4.0, 2.0, 1.0]
    np.testing.assert_allclose(spectrum(matrix), [4, 2, 1])
    np.testing.assert_allclose(normalised_spectrum(matrix), np.array([16, 4, 1]) / 21)


def test_effective_rank_counts_equal_directions():
    orthonormal = np.linalg.qr(RNG.normal(size=(11, 5)))[0]
    for rank in (1, 2, 5):
        assert effective_rank(3 * orthonormal[:, :rank]) == pytest.approx(rank)
    assert 1 < effective_rank(orthonormal * [5, 1, 1, 1, 1]) < 5


def test_alignment_is_the_length_of_the_projection():
    basis = np.linalg.qr(RNG.normal(size=(7, 7)))[0]
    inside, outside = basis[:, :2] @ [1.0, 2.0], basis[:, 5]
    between = basis[:, 0] + basis[:, 6]
    vectors = np.stack((inside, outside, between), axis=1)
    np.testing.assert_allclose(subspace_alignment(vectors, basis[:, :2]), [1, 0, np.sqrt(0.5)], atol=1e-12)
    graded = basis[:, :6] * [3.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(subspace_alignment(vectors, graded, rank=2), [1, 0, np.sqrt(0.5)], atol=1e-12)


def test_alignment_does_not_depend_on_the_basis_and_the_published_number_does():
    vectors, matrix = RNG.normal(size=(7, 2)), RNG.normal(size=(7, 3))
    turn = np.linalg.qr(RNG.normal(size=(7, 7)))[0]
    np.testing.assert_allclose(subspace_alignment(turn @ vectors, turn @ matrix), subspace_alignment(vectors, matrix))
    published = rotation_alignment(vectors, matrix)
    u = np.linalg.svd(matrix)[0]
    expected = [abs(e @ u @ e) / (e @ e) for e in vectors.T]
    np.testing.assert_allclose(published, expected)
    assert np.abs(rotation_alignment(turn @ vectors, turn @ matrix) - published).max() > 0.01


def test_embedding_row():
    row = embedding_spectra(PARAMETERS).iloc[0]
    embed = PARAMETERS["token_embedding.weight"].detach().double().numpy()
    position = PARAMETERS["position_embedding.weight"].detach().double().numpy()
    assert embed.shape == (14, 4)
    assert position.shape == (14, 10)
    assert row["embed/trace"] == pytest.approx((embed**2).sum())
    assert row["postn/trace"] == pytest.approx((position**2).sum())
    assert sum(row[f"postn/S_normed/{i}"] for i in range(10)) == pytest.approx(1)
    assert row["embed/S/0"] == pytest.approx(np.linalg.norm(embed, 2))
    assert row["alignment/3"] == pytest.approx(subspace_alignment(embed, position)[3])


def test_effective_unembedding_is_the_norm_and_the_linear_map_together():
    table = layer_norm_coordinates(PARAMETERS).set_index(["layer", "parameter", "index"])["value"].sort_index()
    normed = torch.from_numpy(RNG.normal(size=14)).float()
    with torch.no_grad():
        gain, shift = PARAMETERS["final_norm.weight"], PARAMETERS["final_norm.bias"]
        output = PARAMETERS["unembedding.weight"][0] @ (gain * normed + shift) + PARAMETERS["unembedding.bias"][0]
    ours = table["effective", "weight"].to_numpy() @ normed.numpy() + table["effective", "bias"].to_numpy()
    np.testing.assert_allclose(ours, [float(output)], rtol=1e-5)
    assert len(table) == 2 * 5 * 14 + 2 * (14 + 1)


def test_a_model_without_norms_has_its_unembedding():
    bare = InContextRegressionTransformer(3, 5, 14, 7, 2, 2, layer_norm=False, seed=0)
    assert set(layer_norm_coordinates(dict(bare.named_parameters()))["layer"]) == {"unembedding"}


def test_statistics_by_hand():
    values = np.array([0.05, -0.05, 3.0, -4.0])
    coordinates = pd.DataFrame(
        {"step": 7, "layer": "final_norm", "parameter": "weight", "index": range(4), "value": values}
    )
    row = layer_norm_statistics(coordinates).iloc[0]
    assert row["step"] == 7
    assert row["norm"] == pytest.approx(np.linalg.norm(values))
    assert row["norm_std"] == pytest.approx(np.abs(values).std())
    assert row["mean"] == pytest.approx(values.mean())
    assert row["std"] == pytest.approx(values.std())
    assert (row["min"], row["max"], row["share_off"]) == (-4, 3, 0.5)
