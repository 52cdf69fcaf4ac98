"""data/L2H4Minf-K16: its checkpoints give the evaluations again, and its estimates have the settings of their sweep files."""

import json
from pathlib import Path

import pytest

from benchmarks.reproduction.longer import FOLDER
from benchmarks.reproduction.shipped import Shipped
from icl.analysis.measures import MEASURES
from icl.analysis.run import load_model
from icl.config import TrainingConfig
from icl.config.sweeps import expand, load_sweep, with_overrides
from icl.estimation import LLCConfig

SWEEPS = Path(__file__).parents[1] / "sweeps"
ESTIMATES = {
    "llc": ("0-L2H4-llcs-over-time-K16", ["task_config.model_seed=0", "sampler_config.num_chains=2"]),
    "llc_calibrated": ("13-L2H4-K16-llcs-calibrated", []),
    "llc_relative": ("8-L2H4-relative-llcs", ["task_config.model_seed=0", "task_config.max_examples=16"]),
    "restricted": ("2-L2H4-rllcs-inclusions", ["sampler_config.num_chains=2"]),
    "complement": ("2-L2H4-rllcs-exclusions", ["sampler_config.num_chains=2"]),
}
"""Table -> the sweep file that made it, and what was changed in it, as its header says."""


@pytest.fixture(scope="module")
def run() -> Shipped:
    (run,) = Shipped.runs(FOLDER)
    return run


def test_the_run_is_one_of_the_training_sweep(run):
    trained = expand(load_sweep(SWEEPS / "training-runs" / "L2H4Minf-K16.yaml"))
    assert run.name in {TrainingConfig.parse(data).name for data in trained}


def test_its_last_checkpoint_gives_the_evaluations_again(run):
    step = run.checkpoints.steps()[-1]
    new = MEASURES["evals"](load_model(run.checkpoints, run.config, step), run.data)
    old = run.needed("evals").set_index("step").loc[step]
    for column in new.columns:
        assert new[column].item() == pytest.approx(old[column], rel=1e-3, abs=1e-4), column


@pytest.mark.parametrize("table", ESTIMATES)
def test_estimates_have_the_settings_of_their_sweep(run, table):
    file, changes = ESTIMATES[table]
    points = with_overrides(expand(load_sweep(SWEEPS / "analysis" / f"{file}.yaml")), changes)
    asked = [LLCConfig.parse(data) for data in points]
    varied = {
        "include",
        "exclude",
        "num_chains",
        "cores",
        "max_memory_bytes",
    }  # columns of the table, or no matter of an estimate
    expected = {k: v for k, v in asked[0].sampler_config.decisive().items() if k not in varied}
    made = json.loads((FOLDER / f"{table}.json").read_text())
    assert {k: v for k, v in made["sampler_config"].items() if k not in varied} == expected
    assert set(run.needed(table)["chains"]) == {asked[0].sampler_config.num_chains}
    assert set(made["runs"].values()) == {run.name}
