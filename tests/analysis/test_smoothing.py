import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from icl.analysis.smoothing import (
    gaussian_kernel,
    local_scatter,
    sigma_ramp,
    variable_gaussian_filter,
)

CURVE = np.random.default_rng(0).normal(size=(53, 3)).cumsum(axis=0)


@pytest.mark.parametrize("mode", ["reflect", "constant", "nearest", "mirror", "wrap"])
def test_constant_width_is_scipys_filter(mode):
    ours = variable_gaussian_filter(CURVE, np.full(len(CURVE), 2.3), mode)
    np.testing.assert_allclose(ours, gaussian_filter1d(CURVE, 2.3, axis=0, mode=mode), atol=1e-12)


def test_each_element_is_scipys_with_its_own_width():
    sigmas = sigma_ramp(len(CURVE), 0.0, 17.0, 40)
    ours = variable_gaussian_filter(CURVE, sigmas)
    for i, sigma in enumerate(sigmas):
        whole = gaussian_filter1d(CURVE, sigma, axis=0) if sigma > 0.1 else CURVE
        np.testing.assert_allclose(ours[i], whole[i], atol=1e-12)


def test_kernel_is_normalised_and_symmetric():
    kernel = gaussian_kernel(3.7)
    assert kernel.size == 2 * int(4 * 3.7 + 0.5) + 1
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_array_equal(kernel, kernel[::-1])
    assert gaussian_kernel(0.0).tolist() == [1.0]


def test_refuses_a_width_per_something_else():
    with pytest.raises(ValueError, match="one entry per row"):
        variable_gaussian_filter(CURVE, np.ones(7))
    with pytest.raises(ValueError, match="sigma"):
        variable_gaussian_filter(CURVE, np.full(len(CURVE), -1.0))
    with pytest.raises(ValueError, match="mode"):
        variable_gaussian_filter(CURVE, 1.0, "mirrored")


def test_ramp_between_its_ends():
    sigmas = sigma_ramp(300, 1.0, 9.0, 200)
    assert (sigmas[:41] == 1.0).all()
    np.testing.assert_allclose(sigmas[200:], 9.0)
    assert sigmas[120] == pytest.approx(5.0)
    assert (np.diff(sigmas) >= 0).all()


def test_scatter_is_the_root_mean_square_distance_nearby():
    points = np.random.default_rng(0).normal(size=(50, 3))
    scatter = local_scatter(points, np.zeros_like(points), 4)
    assert scatter[20] == pytest.approx(np.sqrt((points[16:25] ** 2).sum() / 9))
    assert scatter.shape == (50,)
