import numpy as np
import pandas as pd
import pytest

from icl.analysis.geometry import (
    centre_displacement,
    detect_forms,
    distance_to,
    geometry_table,
    influence_range,
    osculating_circles,
    vertices,
)
from icl.analysis.smoothing import local_scatter, variable_gaussian_filter

ANGLE = np.linspace(0, 2 * np.pi, 2001)
A, B = 3.0, 2.0
ELLIPSE = np.stack((A * np.cos(ANGLE), B * np.sin(ANGLE)), axis=1)


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_circle_has_one_centre_and_signed_curvature(turn):
    centre = np.array([5.0, -2.0])
    circle = centre + 1.7 * np.stack((np.cos(ANGLE), turn * np.sin(ANGLE)), axis=1)
    result = osculating_circles(circle)
    np.testing.assert_allclose(result.curvature, turn / 1.7, rtol=1e-4)
    np.testing.assert_allclose(result.radius, 1.7, rtol=1e-4)
    np.testing.assert_allclose(result.centre, np.broadcast_to(centre, result.centre.shape), atol=1e-3)


def test_ellipse_has_its_evolute():
    result = osculating_circles(ELLIPSE)
    t = ANGLE[1:-1]
    focal = A**2 - B**2
    astroid = np.stack((focal / A * np.cos(t) ** 3, -focal / B * np.sin(t) ** 3), axis=1)
    np.testing.assert_allclose(result.centre, astroid, atol=1e-3)
    np.testing.assert_allclose(
        result.curvature, A * B / (A**2 * np.sin(t) ** 2 + B**2 * np.cos(t) ** 2) ** 1.5, rtol=1e-4
    )


def test_curvature_does_not_depend_on_speed():
    u = np.linspace(0, 1, 4001)
    t = np.pi * (u + 0.1 * np.sin(2 * np.pi * u))
    result = osculating_circles(np.stack((np.cos(t), np.sin(t)), axis=1))
    np.testing.assert_allclose(result.curvature, 1.0, rtol=1e-3)


def test_straight_line_has_no_centre():
    result = osculating_circles(np.stack((np.arange(7.0), 2 * np.arange(7.0)), axis=1))
    assert (result.curvature == 0).all()
    assert np.isinf(result.radius).all()


def test_vertices_of_an_ellipse_are_its_axes():
    t = np.linspace(0.3, 2 * np.pi + 0.3, 1501)
    curve = np.stack((A * np.cos(t), B * np.sin(t)), axis=1)
    result = osculating_circles(curve)
    found = t[result.index[vertices(result.curvature)]]
    np.testing.assert_allclose(found, np.array([1, 2, 3, 4]) * np.pi / 2, atol=0.01)


def test_centre_stands_still_at_the_cusps_of_the_evolute():
    result = osculating_circles(ELLIPSE)
    displacement = centre_displacement(result)
    quarter = 500
    assert displacement[quarter - 1] < 0.02 * displacement.max()


def test_forms_of_an_ellipse_are_the_cusps_of_its_evolute():
    t = np.linspace(0.5, 5.5, 1200)
    curve = np.stack((A * np.cos(t), B * np.sin(t)), axis=1)
    forms = detect_forms(curve, np.arange(1200) * 10, num_components=2)
    focal = A**2 - B**2
    cusps = [(0, -focal / B), (-focal / A, 0), (0, focal / B)]
    np.testing.assert_allclose(forms[["form/0", "form/1"]], cusps, atol=0.02)
    np.testing.assert_allclose(t[forms["index"]], np.array([1, 2, 3]) * np.pi / 2, atol=0.05)
    np.testing.assert_array_equal(forms["step"], forms["index"] * 10)
    assert ((forms["first_step"] <= forms["step"]) & (forms["step"] <= forms["last_step"])).all()


def test_a_form_must_stand_still_in_every_plane():
    # Elliptic in the first plane, a parabola's drift in the third component: vertices of (0, 1) are not vertices of the others.
    t = np.linspace(0.5, 5.5, 1200)
    flat = np.stack((A * np.cos(t), B * np.sin(t)), axis=1)
    drifting = np.column_stack((flat, 4 * np.cos(t + 0.8) + t))
    assert len(detect_forms(flat, t, num_components=2)) == 3
    assert len(detect_forms(drifting, t, num_components=3, window=24)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_noise_about_a_resting_point_has_no_form(seed):
    raw = np.random.default_rng(seed).normal(0, 0.2, (5000, 3))
    smooth = variable_gaussian_filter(raw, 60.0)
    steps = np.arange(5000)
    assert len(detect_forms(smooth, steps)) > 3
    assert len(detect_forms(smooth, steps, scatter=local_scatter(raw, smooth, 60))) == 0


def test_a_trajectory_that_moves_more_than_it_scatters_keeps_its_forms():
    t = np.linspace(0.5, 5.5, 1200)
    curve = np.stack((A * np.cos(t), B * np.sin(t)), axis=1)
    pd.testing.assert_frame_equal(detect_forms(curve, t, 2, scatter=np.full(1200, 0.05)), detect_forms(curve, t, 2))
    assert len(detect_forms(curve, t, 2, scatter=np.full(1200, 50.0))) == 0


def test_influence_range_is_where_the_distance_is_flat():
    t = np.linspace(-2, 2, 401)
    curve = np.stack((t, t**2), axis=1)
    first, last = influence_range(curve, (0.0, 0.5), 200, tolerance=0.1)
    distance = np.sqrt(distance_to(curve, (0.0, 0.5)))
    assert np.abs(distance[first : last + 1] / 0.5 - 1).max() <= 0.1
    assert distance[first - 1] > 0.55
    assert distance[last + 1] > 0.55


def test_table_has_every_plane():
    scores = np.random.default_rng(0).normal(size=(11, 4)).cumsum(axis=0)
    table = geometry_table(scores, np.arange(11) * 7, num_components=3)
    assert table.groupby(["pc_x", "pc_y"]).size().to_dict() == {(1, 0): 9, (2, 0): 9, (2, 1): 9}
    assert table["step"].iloc[0] == 7
    plane = osculating_circles(scores[:, [2, 0]])
    chosen = table[(table["pc_x"] == 2) & (table["pc_y"] == 0)]
    np.testing.assert_array_equal(chosen["curvature"], plane.curvature)


def test_refuses_what_is_not_a_trajectory():
    with pytest.raises(ValueError, match="plane curve"):
        osculating_circles(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="two components"):
        detect_forms(np.zeros((50, 1)), np.arange(50))
    with pytest.raises(ValueError, match="too few"):
        detect_forms(np.zeros((9, 3)), np.arange(9))
