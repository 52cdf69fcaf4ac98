"""Sums over the eigenvalues of a matrix, from its products alone, beside all its eigenvalues."""

import numpy as np
import pytest
import torch

from icl.analysis.curvature import curvature_spectrum
from icl.streams import Stream


def matrix(values: np.ndarray) -> torch.Tensor:
    size = len(values)
    rotation = torch.linalg.qr(Stream(2, "curvature/test").normal(0, (size, size)).double()).Q
    return rotation * torch.as_tensor(values) @ rotation.T


VALUES = np.concatenate([np.geomspace(1e-3, 300, 60), np.full(97, 0.0), -np.geomspace(1e-3, 1e-2, 6)])
"""Decades of curvature, many flat directions, and some that bend down a little."""


def soft(gamma):
    return lambda h: h / (h + gamma)


@pytest.fixture(scope="module")
def found():
    dense = matrix(VALUES)
    like = torch.zeros(len(VALUES), dtype=torch.float64)
    return curvature_spectrum(lambda v: dense @ v, like, k=12, num_probes=6, num_nodes=40)


@pytest.mark.parametrize("gamma", [0.05, 1.0, 30.0])
def test_a_sum_over_all_eigenvalues_is_found_within_its_error(found, gamma):
    total, error = found.total(soft(gamma))
    assert abs(total - soft(gamma)(VALUES).sum()) < 4 * error + 1e-3
    assert error < 0.15 * total


def test_the_largest_eigenvalues_stand_alone_and_the_others_are_counted(found):
    np.testing.assert_allclose(found.eigenvalues, np.sort(VALUES)[::-1][:12], rtol=1e-3)
    # Sign vectors have the length √P exactly, and lose the share of the leading directions.
    np.testing.assert_allclose(found.weights.sum(axis=1), len(VALUES) - 12, rtol=0.15)
    assert -0.0101 < found.lowest < -0.005


def test_traces_are_exact_per_probe():
    """m nodes integrate polynomials of degree below 2m: one node has the trace of each probe, two its cube."""
    dense, like = matrix(VALUES), torch.zeros(len(VALUES), dtype=torch.float64)
    few, many = (curvature_spectrum(lambda v: dense @ v, like, k=3, num_probes=2, num_nodes=nodes) for nodes in (2, 30))
    for power in (1, 2, 3):
        mine, exact = ((each.weights * each.nodes**power).sum(axis=1) for each in (few, many))
        np.testing.assert_allclose(mine, exact, rtol=1e-6)


def test_a_matrix_of_few_directions_is_exhausted():
    """There are fewer directions than nodes; the rest of the nodes count nothing."""
    dense = matrix(np.array([5.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    like = torch.zeros(7, dtype=torch.float64)
    found = curvature_spectrum(lambda v: dense @ v, like, k=1, num_probes=12, num_nodes=6)
    total, error = found.total(np.square)
    assert abs(total - (25 + 4 + 1)) < 4 * error
