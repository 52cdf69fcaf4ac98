import tracemalloc

import numpy as np
import pytest

from icl.analysis.essential_dynamics import pca, trajectory_table, write_rows

ROWS = np.random.default_rng(0).normal(size=(13, 101)).cumsum(axis=0) + 50


@pytest.mark.parametrize("block", [7, 101, 4096])
def test_blocks_give_the_singular_value_decomposition(block):
    fitted = pca(ROWS, 5, block)
    centred = ROWS - ROWS.mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(fitted.explained_variance_ratio, (s**2 / (s**2).sum())[:5])
    assert fitted.total_variance == pytest.approx(np.var(ROWS, axis=0, ddof=1).sum())
    signs = np.sign((fitted.components * vt[:5]).sum(axis=1))
    np.testing.assert_allclose(fitted.components, vt[:5] * signs[:, None], atol=1e-8)
    np.testing.assert_allclose(fitted.scores, (u * s)[:, :5] * signs, atol=1e-7)
    np.testing.assert_allclose(fitted.transform(ROWS, block), fitted.scores, atol=1e-7)


def test_a_line_has_one_component():
    line = np.outer(np.arange(7.0), [3, 4, 0]) + np.array([1, 2, 3])
    fitted = pca(line, 3)
    np.testing.assert_allclose(fitted.explained_variance_ratio, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(fitted.components[0], [0.6, 0.8, 0], atol=1e-12)
    np.testing.assert_allclose(fitted.scores[:, 0], 5 * (np.arange(7) - 3), atol=1e-12)
    np.testing.assert_array_equal(fitted.components[1:], 0)
    assert pca(np.ones((4, 3)), 2).explained_variance_ratio.tolist() == [0, 0]


@pytest.mark.parametrize("block", [3, 100])
def test_more_rows_than_columns_have_the_same_components(block):
    rows = np.random.default_rng(3).normal(size=(29, 7)) * np.arange(1, 8)
    tall, wide = pca(rows, 3, block), pca(np.hstack((rows, np.zeros((29, 30)))), 3)
    np.testing.assert_allclose(tall.components, wide.components[:, :7], atol=1e-9)
    np.testing.assert_allclose(tall.scores, wide.scores, atol=1e-9)
    np.testing.assert_allclose(tall.explained_variance_ratio, wide.explained_variance_ratio)
    np.testing.assert_allclose(tall.total_variance, wide.total_variance)
    np.testing.assert_allclose(tall.transform(rows, block), tall.scores, atol=1e-9)


def test_other_rows_are_projected_not_fitted():
    fitted = pca(ROWS, 2)
    np.testing.assert_allclose(fitted.transform(fitted.mean[None]), 0, atol=1e-10)
    reference = fitted.mean + 3 * fitted.components[1]
    np.testing.assert_allclose(fitted.transform(reference[None]), [[0, 3]], atol=1e-8)


def test_half_precision_file_gives_the_components(tmp_path):
    matrix = write_rows(tmp_path / "rows.npy", iter(ROWS), 13)
    assert matrix.dtype == np.float16
    exact, stored = pca(ROWS, 3), pca(matrix, 3)
    # Rounding adds 2^-11/√12 of each number, here about 0.007 against steps of 1.
    np.testing.assert_allclose(stored.explained_variance_ratio, exact.explained_variance_ratio, atol=2e-4)
    np.testing.assert_allclose(stored.scores, exact.scores, atol=0.3)


def test_memory_is_the_gram_matrix_and_one_block(tmp_path):
    num, size, block = 40, 60_000, 1000
    rng = np.random.default_rng(0)
    matrix = write_rows(tmp_path / "rows.npy", (rng.normal(size=size) for _ in range(num)), num)
    tracemalloc.start()
    pca(matrix, 2, block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Mean, two components and their copies are 8·size bytes each; the matrix in float64 would be num of them.
    assert peak < 8 * (8 * size + 2 * num**2 + 6 * num * block)
    assert peak < 8 * num * size / 2


@pytest.mark.slow
def test_the_published_size_fits_in_memory(tmp_path):
    num, size = 5000, 81_920
    path = tmp_path / "rows.npy"
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, size)).astype(np.float32)
    times = np.linspace(0, 6, num)
    curve = np.stack((5 * np.cos(times), 2 * np.sin(times), times), axis=1).astype(np.float32)
    matrix = write_rows(path, (point @ directions for point in curve), num)
    tracemalloc.start()
    fitted = pca(matrix, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"5000 x 81,920: peak {peak / 2**20:.0f} MiB, float32 rows would be {4 * num * size / 2**20:.0f} MiB")
    assert peak < 1.5 * 2**30
    assert fitted.explained_variance_ratio[:3].sum() > 0.999


def test_a_file_appears_only_when_whole(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(ValueError, match="got 12 rows"):
        write_rows(path, iter(ROWS[:12]), 13)
    with pytest.raises(ValueError, match="row 12 has 101 features; expected 12 rows"):
        write_rows(path, iter(ROWS), 12)
    with pytest.raises(ValueError, match="row 1 has 100 features"):
        write_rows(path, iter([ROWS[0], ROWS[1, 1:]]), 2)
    with pytest.raises(ValueError, match="float32"):
        write_rows(path, iter(ROWS * 1e5), 13)
    assert not path.exists()


def test_tables():
    fitted = pca(ROWS, 2)
    table = trajectory_table(np.arange(13) * 10, fitted.scores, variant="tokens")
    assert list(table.columns) == ["step", "variant", "pc/0", "pc/1"]
    np.testing.assert_array_equal(table["pc/1"], fitted.scores[:, 1])


def test_refuses_what_is_not_a_trajectory():
    with pytest.raises(ValueError, match="two rows"):
        pca(ROWS[:1], 1)
    with pytest.raises(ValueError, match="num_components"):
        pca(ROWS, 14)
    with pytest.raises(ValueError, match="finite"):
        pca(np.where(ROWS.max() == ROWS, np.nan, ROWS), 2)
    with pytest.raises(ValueError, match="101 features"):
        pca(ROWS, 2).transform(ROWS[:, 1:])
