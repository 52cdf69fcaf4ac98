import numpy as np
import pandas as pd
import pytest

from icl.analysis.derivatives import add_derivatives, d_dlogt, d_dt, dlog_dlogt

STEPS = np.array([0, 1, 3, 4, 9, 20, 50])


def test_line_has_its_slope_on_an_uneven_grid():
    np.testing.assert_allclose(d_dt(STEPS, 3.0 * STEPS - 7), 3.0)


def test_equals_the_mean_of_neighbouring_slopes():
    values = np.random.default_rng(0).normal(size=STEPS.size)
    expected = [
        0.5
        * (
            (values[i + 1] - values[i]) / (STEPS[i + 1] - STEPS[i])
            + (values[i] - values[i - 1]) / (STEPS[i] - STEPS[i - 1])
        )
        for i in range(1, STEPS.size - 1)
    ]
    np.testing.assert_allclose(d_dt(STEPS, values), [expected[0], *expected, expected[-1]])


def test_logarithmic_derivatives_of_a_power_law():
    np.testing.assert_allclose(d_dlogt(STEPS, 2 * np.log1p(STEPS)), 2.0)
    np.testing.assert_allclose(dlog_dlogt(STEPS, (STEPS + 1.0) ** -1.5), -1.5)


def test_last_axis_is_time():
    values = np.random.default_rng(1).normal(size=(3, STEPS.size))
    np.testing.assert_array_equal(d_dt(STEPS, values)[1], d_dt(STEPS, values[1]))
    assert d_dt([0, 2], [1.0, 5.0]).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("steps", "values", "message"),
    [
        ([0, 1], [1.0], "agree"),
        ([0], [1.0], "two points"),
        ([0, 2, 2], [1.0, 2.0, 3.0], "increasing"),
    ],
)
def test_refuses_what_has_no_derivative(steps, values, message):
    with pytest.raises(ValueError, match=message):
        d_dt(steps, values)


def test_dlog_needs_positive_values():
    with pytest.raises(ValueError, match="positive"):
        dlog_dlogt([0, 1], [1.0, 0.0])


def test_table_differentiates_each_run_by_itself():
    table = pd.DataFrame({"model_seed": [1, 0, 1, 0], "step": [5, 0, 0, 10], "loss": [1.0, 3.0, -4.0, 13.0]})
    result = add_derivatives(table, ["loss"]).set_index(["model_seed", "step"])
    assert result["loss/d_dt"].to_dict() == {(0, 0): 1.0, (0, 10): 1.0, (1, 0): 1.0, (1, 5): 1.0}
    assert result["loss/dlog_dlogt"].isna().loc[1].all()
    assert result["loss/dlog_dlogt"].notna().loc[0].all()
