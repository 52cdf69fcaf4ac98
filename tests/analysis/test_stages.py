import numpy as np
import pandas as pd
import pytest

from icl.analysis.stages import PUBLISHED_STAGE_ENDS, boundary_table, detectable, find_boundaries, stage_table

SPARSE = np.array([200, 507, 755, 984, 1283, 1910, 2490, 3247, 4232, 6299, 8211, 10101, 12221, 20202, 30909, 40292, 50505, 60606,
                   78172, 101010, 126262, 197702, 252525, 313131, 398989, 499999])  # fmt: skip
DENSE = np.unique(np.concatenate((SPARSE, np.geomspace(1, 300, 12).astype(int))))
WITHIN = np.log(1.25)


def phases(steps, *parts):
    """A sum of sigmoids in log t: (height, step of its middle, width in e-folds) each."""
    x = np.log1p(steps)
    return sum(height / (1 + np.exp(-(x - np.log(middle)) / width)) for height, middle, width in parts)


ONE_PHASE = {
    "flat": (0.0, 1e3, 1.0),
    "sharp": (100.0, 5e3, 0.6),
    "slow": (100.0, 5e4, 2.0),
    "falling": (-60.0, 2e4, 0.8),
}
MANY_PHASES = {
    "rest": [(40, 400, 0.35), (150, 12_000, 0.5)],
    "maximum": [(150, 3_000, 0.6), (-60, 100_000, 0.4)],
    "three": [(40, 300, 0.3), (150, 7_000, 0.4), (-60, 50_000, 0.15), (30, 300_000, 0.2)],
    "four": [(40, 400, 0.35), (150, 9_000, 0.5), (-30, 70_000, 0.15), (-50, 200_000, 0.15), (30, 440_000, 0.08)],
}
EXPECTED = {"rest": 1, "maximum": 1, "three": 3, "four": 4}


def true_boundaries(parts):
    """The minima of |dλ/dlog t| of the noiseless curve, by brute force."""
    x = np.linspace(np.log1p(1), np.log1p(499_999), 100_001)
    speed = np.abs(np.gradient(phases(np.expm1(x), *parts), x))
    return np.expm1(x[1:-1][(speed[1:-1] < speed[:-2]) & (speed[1:-1] < speed[2:])])


@pytest.mark.parametrize("noise", [0.05, 0.2])
@pytest.mark.parametrize("name", MANY_PHASES)
def test_known_boundaries_are_found_where_they_are(name, noise):
    expected = true_boundaries(MANY_PHASES[name])
    assert len(expected) == EXPECTED[name]
    llc = phases(DENSE, *MANY_PHASES[name]) + noise * np.random.default_rng(1).standard_normal(DENSE.size)
    found = find_boundaries(DENSE, llc, noise, num_draws=300)
    assert len(found.steps) == len(expected), str(found)
    assert np.abs(np.log(found.steps / expected)).max() < WITHIN
    assert (found.probability >= 0.95).all()
    assert ((found.low <= found.steps) & (found.steps <= found.high)).all()


@pytest.mark.parametrize("noise", [0.3, 3.0])
@pytest.mark.parametrize("name", ONE_PHASE)
def test_a_single_phase_has_no_boundary(name, noise):
    for seed in range(2):
        llc = phases(SPARSE, ONE_PHASE[name]) + noise * np.random.default_rng(seed).standard_normal(SPARSE.size)
        found = find_boundaries(SPARSE, llc, noise, num_draws=300)
        assert not found.steps.size
        assert str(found) == "no boundary is significant"


def test_a_slow_fall_counts_though_no_slope_on_it_is_certain():
    # From one estimate to the next it falls by about one standard error, over the whole by many.
    noise, rise = 1.5, (150, 3_000, 0.6)
    falling = phases(SPARSE, rise, (-25, 150_000, 0.7))
    resting = phases(SPARSE, rise)
    for seed in range(5):
        scatter = noise * np.random.default_rng(seed).standard_normal(SPARSE.size)
        assert find_boundaries(SPARSE, falling + scatter, noise, num_draws=300).extremum.tolist() == [True]
        assert not find_boundaries(SPARSE, resting + scatter, noise, num_draws=300).steps.size


def steady_fall(steps):
    """Rises, turns once, and falls at a constant rate."""
    return phases(steps, (150, 700, 0.2)) - 12 * 0.3 * np.logaddexp(0, (np.log1p(steps) - 8) / 0.3)


@pytest.mark.parametrize("noise", [1.0, 2.0, 3.0])
def test_a_steady_fall_has_no_rest(noise):
    for seed in range(4):
        llc = steady_fall(SPARSE) + noise * np.random.default_rng(seed).standard_normal(SPARSE.size)
        assert find_boundaries(SPARSE, llc, noise, num_draws=300).extremum.tolist() in ([], [True])


@pytest.mark.slow
def test_false_rests_are_rare():
    curves = {"steady": steady_fall(SPARSE), "wide": phases(SPARSE, (150, 700, 0.25), (-60, 60_000, 1.2))}
    for name, curve in curves.items():
        turns, rests = 0, 0
        for seed in range(60):
            noise = (1.0, 2.0, 3.0)[seed % 3]
            scatter = noise * np.random.default_rng(seed).standard_normal(SPARSE.size)
            found = find_boundaries(SPARSE, curve + scatter, noise, num_draws=300)
            turns, rests = turns + bool(found.extremum.any()), rests + bool((~found.extremum).any())
        print(f"{name}: the turn is found in {turns} of 60 curves, a rest that is none in {rests}")
        assert rests <= 8


def test_more_noise_finds_less_but_nothing_else():
    expected = true_boundaries(MANY_PHASES["three"])
    counts = []
    for noise in (0.5, 3.0, 20.0, 200.0):
        llc = phases(SPARSE, *MANY_PHASES["three"]) + noise * np.random.default_rng(0).standard_normal(SPARSE.size)
        found = find_boundaries(SPARSE, llc, noise, num_draws=300)
        counts.append(len(found.steps))
        distance = np.abs(np.log(found.steps[:, None] / expected)).min(axis=1)
        assert (distance < 2 * WITHIN).all(), str(found)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_kinds_are_told_apart():
    rest = find_boundaries(DENSE, phases(DENSE, *MANY_PHASES["rest"]), 0.3, num_draws=200)
    turn = find_boundaries(DENSE, phases(DENSE, *MANY_PHASES["maximum"]), 0.3, num_draws=200)
    assert rest.extremum.tolist() == [False]
    assert turn.extremum.tolist() == [True]


def test_units_of_the_estimate_do_not_matter():
    llc = phases(SPARSE, *MANY_PHASES["three"]) + np.random.default_rng(2).standard_normal(SPARSE.size)
    found = find_boundaries(SPARSE, llc, 1.0, num_draws=300)
    mirrored = find_boundaries(SPARSE, -1000 * llc + 5, 1000.0, num_draws=300)
    assert found.steps.size
    # A draw of the mirrored curve is another draw: medians and shares have the spread of 300 trials.
    np.testing.assert_allclose(np.log(mirrored.steps), np.log(found.steps), atol=0.05)
    np.testing.assert_allclose(mirrored.probability, found.probability, atol=0.05)


def test_scatter_beyond_the_stated_errors_makes_no_boundaries():
    llc = phases(SPARSE, ONE_PHASE["slow"]) + 5 * np.random.default_rng(3).standard_normal(SPARSE.size)
    assert not find_boundaries(SPARSE, llc, 0.01, num_draws=300).steps.size


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_PHASE)
def test_false_positives_are_rare(name):
    trials, hits = 60, 0
    for seed in range(trials):
        llc = phases(SPARSE, ONE_PHASE[name]) + np.random.default_rng(seed).standard_normal(SPARSE.size)
        hits += bool(find_boundaries(SPARSE, llc, 1.0, num_draws=300).steps.size)
    print(f"{name}: {hits} of {trials} curves without a boundary have one")
    # At a rate of 5 % more than 8 of 60 have a probability below 1 %.
    assert hits <= 8


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_intervals_cover_the_truth(noise):
    expected, covered, found = true_boundaries(MANY_PHASES["three"]), 0, 0
    for seed in range(30):
        llc = phases(DENSE, *MANY_PHASES["three"]) + noise * np.random.default_rng(seed).standard_normal(DENSE.size)
        boundaries = find_boundaries(DENSE, llc, noise, num_draws=300)
        for step, low, high in zip(boundaries.steps, boundaries.low, boundaries.high, strict=True):
            nearest = expected[np.abs(np.log(expected / step)).argmin()]
            found += 1
            covered += low <= nearest <= high
    print(
        f"noise {noise}: {found / 30:.2f} of 3 boundaries found, {covered / found:.2f} of the intervals hold the truth"
    )
    assert covered / found > 0.6


def test_stage_changes_are_the_curve_s_and_so_are_the_types():
    llc = phases(DENSE, *MANY_PHASES["maximum"])
    loss = 5 - 0.3 * np.log1p(DENSE)
    table = stage_table({"first": 28_000, "second": 500_000}, DENSE, loss, llc, 0.1)
    edges = np.array([DENSE[0], 28_000, 499_999])
    np.testing.assert_allclose(table["delta_llc"], np.diff(phases(edges, *MANY_PHASES["maximum"])), atol=1.0)
    np.testing.assert_allclose(table["delta_loss"], -0.3 * np.diff(np.log1p(edges)), atol=0.01)
    assert table["type"].tolist() == ["A", "B"]
    assert (table["type_probability"] > 0.99).all()
    assert (table["delta_llc_std"] < 1).all()
    rising = stage_table([499_999], DENSE, -loss, llc)
    assert rising["stage"].tolist() == ["S1"]
    assert rising["type"].tolist() == ["other"]


def test_boundaries_beside_the_published_ones():
    found = find_boundaries(DENSE, phases(DENSE, *MANY_PHASES["maximum"]), 0.3, num_draws=200)
    table = boundary_table(found)
    assert table["published"].tolist() == ["LR2"]
    assert table["kind"].tolist() == ["extremum"]
    assert table["log_ratio"].iloc[0] == pytest.approx(np.log(found.steps[0] / PUBLISHED_STAGE_ENDS["LR2"]))
    nothing = find_boundaries(DENSE, np.ones(DENSE.size), 0.1, num_draws=50)
    assert boundary_table(nothing).empty
    assert list(boundary_table(nothing).columns) == list(table.columns)


@pytest.mark.parametrize(
    ("steps", "llc", "message"),
    [
        (range(7), np.ones(7), "8 checkpoints"),
        ([0, 1, 2, 3, 4, 5, 7, 6], np.ones(8), "increasing"),
        (range(9), np.ones(8), "increasing"),
        (range(8), [1, 2, 3, 4, 5, 6, 7, np.nan], "finite"),
    ],
)
def test_refuses_what_has_no_stages(steps, llc, message):
    with pytest.raises(ValueError, match=message):
        find_boundaries(list(steps), llc)


def test_refuses_ends_outside_the_curve():
    with pytest.raises(ValueError, match="increase within"):
        stage_table([600_000], SPARSE, np.ones(SPARSE.size), np.ones(SPARSE.size))


def test_estimates_without_an_error_take_the_largest_and_those_that_are_not_finite_go():
    table = pd.DataFrame(
        {
            "step": [3, 1, 2, 4, 5],
            "llc/mean": [3.0, 1.0, np.nan, np.inf, 5.0],
            "llc/mcse": [0.5, np.nan, 9.0, 9.0, np.inf],
            "loss": [1.0, 1.0, 1.0, 1.0, np.nan],
        }
    )
    assert detectable(table)[["step", "llc/mcse"]].to_numpy().tolist() == [[1, 0.5], [3, 0.5], [5, 0.5]]
    assert detectable(table, "loss")["step"].tolist() == [1, 3]
    assert detectable(table.drop(columns="llc/mcse"))["llc/mcse"].tolist() == [0, 0, 0]
