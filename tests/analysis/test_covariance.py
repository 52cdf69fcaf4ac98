import numpy as np
import pytest

from icl.analysis.covariance import covariance_spectrum, covariance_table, weight_pca
from icl.analysis.weight_groups import head_group, standard_pairs, weight_groups
from icl.model import InContextRegressionTransformer, TransformerShape, flatten

RNG = np.random.default_rng(0)
LEFT = RNG.normal(size=(31, 5)) + 100
RIGHT = LEFT @ RNG.normal(size=(5, 7)) + RNG.normal(size=(31, 7))
SHAPE = TransformerShape(3, 5, embed_size=6, mlp_size=7, num_heads=2, num_layers=2)


def brute_force(left, right):
    outer = sum(np.outer(u, v) for u, v in zip(left, right, strict=True)) / len(left)
    return outer - np.outer(left.mean(axis=0), right.mean(axis=0))


def test_spectrum_of_a_covariance_with_itself_is_its_eigenvalues():
    values, vectors, same = covariance_spectrum(LEFT, num_values=5)
    covariance = brute_force(LEFT, LEFT)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(covariance)[::-1], atol=1e-9)
    np.testing.assert_allclose(covariance @ vectors, vectors * values, atol=1e-9)
    np.testing.assert_array_equal(vectors, same)


def test_spectrum_of_two_groups_is_singular_values_not_eigenvalues():
    values, left, right = covariance_spectrum(LEFT, RIGHT, 3)
    covariance = brute_force(LEFT, RIGHT)
    np.testing.assert_allclose(values, np.linalg.svd(covariance, compute_uv=False)[:3], atol=1e-9)
    np.testing.assert_allclose(covariance @ right, left * values, atol=1e-8)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-12)


def test_more_weights_than_draws_never_form_the_matrix():
    wide = RNG.normal(size=(4, 50_000))
    values, vectors, _ = covariance_spectrum(wide, num_values=9)
    assert values.shape == (4,)
    assert values.sum() == pytest.approx(np.var(wide, axis=0).sum())
    assert vectors.shape == (50_000, 4)


def test_groups_tile_the_weights_that_the_reference_looks_at():
    groups = weight_groups(SHAPE)
    assert [group.depth for group in groups] == sorted(group.depth for group in groups)
    flat = flatten(InContextRegressionTransformer.from_shape(SHAPE, seed=0).state_dict()).numpy()
    model = InContextRegressionTransformer.from_shape(SHAPE, seed=0)
    qkv = model.state_dict()["blocks.1.attention.qkv.weight"].numpy()
    # Width c = 3, so head h owns rows 9h .. 9h+8, its q, k and v.
    for head in range(2):
        group = head_group(SHAPE, 1, head)
        np.testing.assert_array_equal(flat[group.entries].reshape(group.size), qkv[9 * head : 9 * head + 9])
    covered = np.concatenate([np.arange(flat.size)[group.entries] for group in groups])
    assert covered.size == np.unique(covered).size
    with pytest.raises(ValueError, match="no head 2"):
        head_group(SHAPE, 0, 2)


def test_table_has_the_reference_s_pairs():
    pairs = standard_pairs(SHAPE)
    names = [(left.name, right.name) for left, right in pairs]
    assert len(names) == len(weight_groups(SHAPE)) + 2 + 2 * 2
    assert ("block_0/head_1", "block_1/head_0") in names
    assert ("block_1/mlp_0", "block_1/mlp_1") in names
    draws = RNG.normal(size=(13, SHAPE.num_parameters))
    table = covariance_table(draws, pairs, 2)
    assert len(table) == 2 * len(pairs)
    chosen = table[(table["left"] == "unembed/norm") & (table["index"] == 0)].iloc[0]
    entries = draws[:, next(group.entries for group in weight_groups(SHAPE) if group.name == "unembed/norm")]
    assert chosen["value"] == pytest.approx(np.linalg.eigvalsh(np.cov(entries.T, bias=True))[-1])
    assert chosen["trace"] == pytest.approx(np.var(entries, axis=0).sum())
    assert table.loc[table["kind"] == "singular value", "trace"].isna().all()


def test_principal_components_of_chains():
    direction = np.linalg.qr(RNG.normal(size=(17, 2)))[0].T
    walk = RNG.normal(size=(3, 11, 2)).cumsum(axis=1) * [5, 1]
    fitted, table = weight_pca(walk @ direction, 2)
    assert fitted.explained_variance_ratio.sum() == pytest.approx(1)
    assert table.groupby("chain").size().tolist() == [11, 11, 11]
    scores = table[["pc/0", "pc/1"]].to_numpy()
    np.testing.assert_allclose(scores @ fitted.components + fitted.mean, (walk @ direction).reshape(-1, 17), atol=1e-9)


def test_refuses_what_is_not_draws():
    with pytest.raises(ValueError, match="expected draws"):
        covariance_spectrum(LEFT, RIGHT[1:])
    with pytest.raises(ValueError, match="chains"):
        weight_pca(LEFT)
