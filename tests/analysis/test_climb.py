"""A crossing is where the loss says it is, and the second half of the draws is what is left when the first is dropped."""

import numpy as np
import pandas as pd
import pytest

from icl.analysis.climb import crossing_draws, estimates_so_far, estimates_within

NBETA = 50.0
DRAWS = np.arange(100, 1001, 100)


def traces_of(losses: dict[tuple[int, int], np.ndarray]) -> pd.DataFrame:
    """(step, chain) -> loss of each stretch."""
    rows = [
        pd.DataFrame({"model_seed": 3, "step": step, "chain": chain, "draw": DRAWS, "loss": loss})
        for (step, chain), loss in losses.items()
    ]
    return pd.concat(rows, ignore_index=True)


def estimates_of(traces: pd.DataFrame, init: dict[int, float], zero: float = 4.0) -> pd.DataFrame:
    mean = traces.groupby("step")["loss"].mean()
    excess = np.array([mean[step] - loss for step, loss in init.items()])
    return pd.DataFrame(
        {
            "model_seed": 3,
            "step": list(init),
            "loss/init": list(init.values()),
            "loss/zero": zero,
            "loss/excess": excess,
            "llc/mean": NBETA * excess,
        }
    )


def test_a_chain_crosses_at_its_first_stretch_above_the_rim():
    leaves = np.where(DRAWS >= 600, 4.5, 2.0)
    back = np.where(DRAWS == 300, 4.1, 2.0)
    diverges = np.where(DRAWS >= 800, np.nan, 2.0)
    traces = traces_of(
        {(10, 0): leaves, (10, 1): back, (10, 2): np.full(10, 2.0), (0, 0): np.full(10, 4.4), (20, 0): diverges}
    )
    found = crossing_draws(traces, estimates_of(traces, {10: 2.0, 0: 4.3, 20: 2.0}))
    assert found["step"].tolist() == [10, 10, 10, 20]  # step 0 is no better than predicting zero itself
    assert found["chain"].tolist() == [0, 1, 2, 0]
    np.testing.assert_array_equal(found["crossing"], [600, 300, np.nan, 800])


def test_a_chain_is_half_way_where_its_loss_is():
    climb = np.linspace(2.0, 4.5, 10)  # from L(w*) = 2 past 4, that of predicting zero
    traces = traces_of({(10, 0): climb})
    for fraction in (0.25, 0.5, 0.9):
        found = crossing_draws(traces, estimates_of(traces, {10: 2.0}), fraction)
        assert found["crossing"].tolist() == [DRAWS[np.argmax(climb > 2 + 2 * fraction)]]


def test_the_second_half_does_not_see_the_first():
    early, late = np.array([9.0, 1.0, 5.0, 2.0, 7.0]), np.array([3.0, 3.2, 3.4, 3.2, 3.2])
    traces = traces_of({(10, 0): np.r_[early, late], (10, 1): np.r_[early[::-1], late + 0.4]})
    row = estimates_within(traces, estimates_of(traces, {10: 2.0})).iloc[0]
    np.testing.assert_allclose(row["loss/mean"], 3.4)
    np.testing.assert_allclose(row["llc/mean"], NBETA * (3.4 - 2.0))
    np.testing.assert_allclose(row["llc/mcse"], NBETA * 0.2)  # two chains, 0.4 apart


def test_stationary_chains_give_the_same_estimate_from_either_half():
    rng = np.random.default_rng(0)
    traces = traces_of({(10, chain): 3 + 0.01 * rng.standard_normal(10) for chain in range(50)})
    estimates = estimates_of(traces, {10: 2.0})
    row = estimates_within(traces, estimates).iloc[0]
    assert abs(row["llc/mean"] - estimates["llc/mean"].iloc[0]) < 4 * row["llc/mcse"]


def test_parts_of_equal_length_average_to_the_whole():
    traces = traces_of({(10, 0): np.linspace(2.0, 4.5, 10), (10, 1): np.linspace(2.5, 3.0, 10)})
    estimates = estimates_of(traces, {10: 2.0})
    parts = [estimates_within(traces, estimates, k / 5, (k + 1) / 5)["llc/mean"].item() for k in range(5)]
    np.testing.assert_allclose(np.mean(parts), estimates["llc/mean"].item())
    assert parts == sorted(parts)  # losses that rise


def test_one_chain_has_no_error():
    traces = traces_of({(10, 0): np.full(10, 3.0)})
    assert np.isnan(estimates_within(traces, estimates_of(traces, {10: 2.0}))["llc/mcse"]).all()


def test_the_last_running_estimate_is_the_estimate_and_one_infinite_chain_ends_the_mean():
    climbs, diverges = 2.0 + DRAWS / 1000, np.where(DRAWS >= 400, np.inf, 3.0)
    traces = traces_of({(10, 0): climbs, (10, 1): climbs + 1, (20, 0): climbs, (20, 1): diverges})
    finite = traces[traces["step"] == 10]
    estimates = pd.concat(
        [estimates_of(finite, {10: 1.5}), pd.DataFrame({"model_seed": [3], "step": 20, "loss/init": 1.5})]
    )
    running = estimates_so_far(traces, estimates.assign(nbeta=NBETA))
    healthy, lost = (rows for _, rows in running.groupby("step"))
    assert healthy["draw"].tolist() == DRAWS.tolist()
    means = [climbs[:count].mean() + 0.5 for count in range(1, len(DRAWS) + 1)]
    np.testing.assert_allclose(healthy["loss/mean"], means)
    np.testing.assert_allclose(healthy["llc/mean"], NBETA * (np.array(means) - 1.5))
    assert healthy["llc/mean"].iloc[-1] == pytest.approx(estimates["llc/mean"].iloc[0])
    np.testing.assert_allclose(healthy["llc/mcse"], NBETA * 0.5)  # chains that are 1 apart: std 1/√2, divided by √2
    assert np.isfinite(lost["llc/mean"]).tolist() == (DRAWS < 400).tolist()


def test_a_longer_stretch_of_draws_counts_more():
    traces = pd.DataFrame({"model_seed": 3, "step": 10, "chain": 0, "draw": [3, 4], "loss": [2.0, 6.0]})
    estimates = pd.DataFrame({"model_seed": [3], "step": 10, "loss/init": 1.0, "nbeta": NBETA})
    assert estimates_so_far(traces, estimates)["loss/mean"].tolist() == [2.0, 3.0]
