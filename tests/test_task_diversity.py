"""docs/task-diversity.md shows what data/L2H4Mfin-K8 holds, and its checkpoints give the tables again."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.task_diversity import (
    CLEAR,
    EARLY,
    FAMILY,
    PAGE,
    SIXTEEN,
    TABLES,
    WINDOW,
    change,
    distances,
    estimates,
    outcomes,
    page,
    sweep_of,
)
from icl.analysis.data import AnalysisData, DataSettings
from icl.analysis.run import load_model
from icl.analysis.transient_ridge import measure_distances
from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.config.sweeps import expand, load_sweep
from icl.estimation import LLCConfig
from icl.figures.elements import rows_where
from icl.figures.families import read_table
from icl.storage import LocalStore

ROOT = Path(__file__).parents[1]
RUNS = [
    (family, path.parent.name)
    for family in (FAMILY, SIXTEEN)
    for path in sorted((family / "checkpoints" / "icl").glob("*/config.json"))
]
SETTINGS = {"absolute": "11-L2H4Mfin-llcs", "relative": "12-L2H4Mfin-relative-llcs"}


def sweep(name: str) -> LLCConfig:
    """The first point of a sweep file."""
    return LLCConfig.parse(expand(load_sweep(ROOT / "sweeps" / "analysis" / f"{name}.yaml"))[0])


def test_its_tables_are_those_of_the_data():
    text = PAGE.read_text()
    assert page(text) == text, "python -m benchmarks.task_diversity"


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_the_checkpoints_give_the_distances_again(family, name):
    run = Checkpoints(LocalStore(family / "checkpoints"), name)
    config = TrainingConfig.parse(run.config()).resolved()
    data, step = AnalysisData(config, DataSettings()), run.steps()[-1]
    measured = measure_distances(load_model(run, config, step), data).iloc[0]
    shipped = rows_where(
        read_table(family, "transient_distances"), num_tasks=float(config.task_config.num_tasks), step=step
    ).iloc[0]
    np.testing.assert_allclose(measured, shipped[measured.index], rtol=1e-3)


def test_its_conclusions_hold():
    """What docs/task-diversity.md says beside its tables."""
    runs = {int(run.tasks): run for run in outcomes()}
    assert [tasks for tasks, run in runs.items() if run.risen] == [16, 64]
    assert [run.apart for run in runs.values()] == sorted((run.apart for run in runs.values()), reverse=True)
    first, *_, last = sorted(set(estimates("relative")["step"]))
    at = {
        (units, step): rows_where(estimates(units), step=step).set_index("num_tasks")["llc/mean"]
        for units in TABLES
        for step in (first, last)
    }
    four = rows_where(distances(), num_tasks=4.0)
    for step, share in ((EARLY[1], 1.0), (first, 0.1)):  # near its dMMSE before M = 16 leaves ridge
        place = rows_where(four, step=step).iloc[0]
        assert place["delta_dmmse"] < share * place["delta_ridge"]
    moved = {tasks: change(tasks, *EARLY) for tasks in runs}  # M = 16 leaves ridge then, and the others do not
    assert moved[16].value > 20
    assert max(each.value for tasks, each in moved.items() if tasks != 16) < 0.3 * moved[16].value
    for units in TABLES:  # M = 16 has by far the largest at the first step; the others are alike
        early = at[units, first]
        assert early[16] > 1.5 * early.drop(16).max()
        assert early.drop([4, 16]).max() < 1.15 * early.drop([4, 16]).min()
        assert 0.9 * early.drop([4, 16]).min() < early[4] < early.drop([4, 16]).max()
        assert at[units, last][4] < 0.5 * at[units, last].drop(4).min()
    assert at["absolute", last].nsmallest(2).index.tolist() == [4, 16]
    assert at["absolute", last].max() < 0.5 * at["absolute", first].min()
    late = at["relative", last]  # larger for few tasks
    assert abs(late[16] - late[64]) < 5 < late[64] - late[256]
    assert max(late[1024], late[4096]) < late[256] - 5
    assert (late > at["relative", first]).drop(4).all()


def test_with_sixteen_examples_the_turn_comes_sooner():
    (short,) = outcomes(SIXTEEN)
    (long,) = (run for run in outcomes(last_step=short.last["step"]) if run.tasks == short.tasks)
    assert short.critical["step"] < long.critical["step"]
    assert short.rise[0] > long.rise[0] > CLEAR * long.rise[1]
    assert (short.side, long.side) == ("dMMSE", "between")
    assert short.nearest["delta_dmmse"] < short.nearest["delta_ridge"]
    assert short.nearest["step"] > long.nearest["step"]
    assert abs(short.rise_from_ridge[0] - long.rise_from_ridge[0]) < long.rise_from_ridge[1]
    assert not short.risen
    assert short.rise_from_ridge[0] > CLEAR * short.rise_from_ridge[1]


def test_the_runs_are_those_of_the_training_sweeps():
    assert RUNS
    for family, name in RUNS:
        given = [] if family == FAMILY else ["num_steps=60000"]
        assert name in {TrainingConfig.parse(data).name for data in expand(load_sweep(sweep_of(family)), given)}


def test_its_words_have_the_numbers_of_the_settings():
    text = " ".join(PAGE.read_text().split())
    assert (WINDOW, CLEAR) == (5, 3.0)
    assert "as means over five checkpoints" in text
    assert "rises by three standard errors" in text
    steps = [sweep(name).sampler_config.step_size for name in (SETTINGS["relative"], "8-L2H4-relative-llcs")]
    assert "The step size is a quarter of that of geometry.md" in text
    assert steps[0] == pytest.approx(steps[1] / 4)


@pytest.mark.parametrize("units", TABLES)
def test_estimates_have_the_settings_of_their_sweep(units):
    config = sweep(SETTINGS[units])
    rows = read_table(FAMILY, TABLES[units])
    made = json.loads((FAMILY / f"{TABLES[units]}.json").read_text())
    expected = config.sampler_config.decisive()
    assert {name: expected[name] for name in made["sampler_config"]} == made["sampler_config"]
    assert set(rows["step"]) <= set(config.steps)
