import numpy as np
import pytest
import torch

from icl.analysis.hessian import (
    estimate_hessian,
    hessian_table,
    hessian_vector_product,
    hutchinson_trace,
    regression_loss,
    top_eigenvalues,
)
from icl.model import InContextRegressionTransformer
from icl.streams import Stream
from icl.tasks import RegressionTask


def small_transformer() -> tuple[InContextRegressionTransformer, torch.Tensor, torch.Tensor]:
    model = InContextRegressionTransformer(2, 3, embed_size=4, mlp_size=5, num_heads=2, num_layers=1, seed=1)
    xs, ys = RegressionTask(2, 3, 0.25).sample(Stream(0, "data"), 0, 11)
    return model.double(), xs.double(), ys.double()


def test_product_is_the_matrix_of_a_quadratic_form():
    matrix = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    symmetric = matrix + matrix.T
    product = hessian_vector_product(lambda w: (w @ symmetric @ w) / 2, torch.ones(7, dtype=torch.float64))
    vector = torch.arange(7, dtype=torch.float64)
    torch.testing.assert_close(product(vector), symmetric @ vector)


def test_everything_equals_the_dense_hessian_of_a_small_transformer():
    model, xs, ys = small_transformer()
    loss, point = regression_loss(model, xs, ys)
    dense = torch.autograd.functional.hessian(loss, point)
    assert isinstance(dense, torch.Tensor)
    eigenvalues = np.linalg.eigvalsh(dense.numpy())
    largest = eigenvalues[np.argsort(-np.abs(eigenvalues))][:4]
    values, vectors = top_eigenvalues(hessian_vector_product(loss, point), point, 4, tolerance=1e-8)
    np.testing.assert_allclose(values, largest, rtol=1e-8)
    np.testing.assert_allclose(dense.numpy() @ vectors, vectors * values, atol=1e-5 * abs(values[0]))
    estimate = estimate_hessian(loss, point, k=4, num_probes=200, tolerance=1e-8)
    # The variance of vᵀAv for random signs is 2 Σ_{i≠j} A_ij², here of what remains outside the four directions.
    projector = np.eye(len(vectors)) - vectors @ vectors.T
    rest = projector @ dense.numpy() @ projector
    true_error = np.sqrt(2 * (np.sum(rest**2) - np.sum(np.diag(rest) ** 2)) / 200)
    assert estimate.trace == pytest.approx(eigenvalues.sum(), abs=4 * true_error)
    assert estimate.trace_std_error == pytest.approx(true_error, rel=0.3)
    assert estimate.num_products > 200


def test_directions_taken_out_carry_no_noise():
    # One direction carries the whole curvature: without it nothing is left, and the trace is exact.
    direction = torch.nn.functional.normalize(torch.arange(1.0, 18.0, dtype=torch.float64), dim=0)
    start = torch.zeros(17, dtype=torch.float64)
    estimate = estimate_hessian(lambda w: 5 * (direction @ w) ** 2 / 2, start, k=1, num_probes=3, tolerance=1e-10)
    assert estimate.trace == pytest.approx(5, rel=1e-10)
    assert estimate.trace_std_error < 1e-9


def test_trace_of_a_diagonal_matrix_needs_one_probe():
    diagonal = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    trace, error = hutchinson_trace(lambda v: diagonal * v, diagonal, 1)
    assert trace == pytest.approx(2.5)
    assert np.isnan(error)


def test_negative_curvature_counts_by_magnitude():
    diagonal = torch.tensor([2.0, -9.0, 1.0, 0.1, 0.2], dtype=torch.float64)
    values, vectors = top_eigenvalues(lambda v: diagonal * v, diagonal, 2)
    np.testing.assert_allclose(values, [-9, 2], rtol=1e-6)
    np.testing.assert_allclose(np.abs(vectors), np.eye(5)[:, [1, 0]], atol=1e-3)


def test_table_repeats_itself():
    model, xs, ys = small_transformer()
    table = hessian_table(model, xs, ys, k=2, num_probes=3)
    expected = ["evals/0", "evals/1", "trace", "trace_std_error", "num_probes", "num_products"]
    assert list(table.columns) == [f"hessian/{name}" for name in expected]
    assert table.equals(hessian_table(model, xs, ys, k=2, num_probes=3))


def test_refuses_what_cannot_be_computed():
    diagonal = torch.ones(3)
    with pytest.raises(ValueError, match="k must lie in"):
        top_eigenvalues(lambda v: v, diagonal, 3)
    with pytest.raises(ValueError, match="num_probes"):
        hutchinson_trace(lambda v: v, diagonal, 0)
