"""data/L2H4Minf-K16: its checkpoints give the evaluations again, and its estimates have the settings of their sweep files."""

import json
from pathlib import Path

import pytest

from benchmarks.reproduction.shipped import Shipped
from benchmarks.reproduction.sixteen import FOLDER
from icl.analysis.measures import MEASURES
from icl.analysis.run import load_model
from icl.config import TrainingConfig
from icl.config.sweeps import expand, load_sweep, with_overrides
from icl.estimation import LLCConfig
from icl.figures.restricted import EXCLUDED, INCLUDED

SWEEPS = Path(__file__).parents[1] / "sweeps"
ESTIMATES = {
    "llc": ("0-L2H4-llcs-over-time-K16", ["task_config.model_seed=0", "sampler_config.num_chains=2"]),
    "llc_calibrated": ("13-L2H4-K16-llcs-calibrated", []),
    "llc_relative": ("8-L2H4-relative-llcs", ["task_config.model_seed=0", "task_config.max_examples=16"]),
    "restricted": ("2-L2H4-rllcs-inclusions", ["sampler_config.num_chains=2"]),
    "complement": ("2-L2H4-rllcs-exclusions", ["sampler_config.num_chains=2"]),
}
"""Table -> the sweep file that made it, and what was changed in it, as its header says."""

VARIED = {"include", "exclude", "num_chains", "cores", "max_memory_bytes"}
"""Settings that are columns of a table, or that do not matter to an estimate."""


RUNS = Shipped.runs(FOLDER)
SHIPPED = [(run, step) for run in RUNS for step in run.checkpoints.steps()]
TABLES = [(run, table) for run in RUNS for table in ESTIMATES if run.table(table) is not None]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_run_is_one_of_the_training_sweep(run):
    trained = expand(load_sweep(SWEEPS / "training-runs" / "L2H4Minf-K16.yaml"))
    assert run.name in {TrainingConfig.parse(data).name for data in trained}


@pytest.mark.parametrize(("run", "step"), SHIPPED, ids=lambda each: getattr(each, "name", each))
def test_its_checkpoints_give_the_evaluations_again(run, step):
    new = MEASURES["evals"](load_model(run.checkpoints, run.config, step), run.data)
    old = run.needed("evals").set_index("step").loc[step]
    for column in new.columns:
        assert new[column].item() == pytest.approx(old[column], rel=1e-3, abs=1e-4), column


@pytest.mark.parametrize(("run", "table"), TABLES, ids=lambda each: getattr(each, "name", each))
def test_estimates_have_the_settings_of_their_sweep(run, table):
    file, changes = ESTIMATES[table]
    points = with_overrides(expand(load_sweep(SWEEPS / "analysis" / f"{file}.yaml")), changes)
    asked = [LLCConfig.parse(data) for data in points]
    made, rows = json.loads((FOLDER / f"{table}.json").read_text()), run.needed(table)
    expected = asked[0].sampler_config.decisive()
    assert {k: v for k, v in made["sampler_config"].items() if k not in VARIED} == {
        k: v for k, v in expected.items() if k not in VARIED
    }
    assert set(rows["chains"]) == {asked[0].sampler_config.num_chains}
    of_seed = str(run.seed), f"model_seed={run.seed},"
    assert {name for label, name in made["runs"].items() if label == of_seed[0] or label.startswith(of_seed[1])} == {
        run.name
    }
    for kind, column in (("include", INCLUDED), ("exclude", EXCLUDED)):
        if column in rows:
            groups = {json.dumps(getattr(each.sampler_config, kind)) for each in asked}
            assert set(rows[column]) == groups
            assert rows.groupby(column)["step"].nunique().nunique() == 1


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_calibrated_curve_has_all_steps_of_its_sweep(run):
    asked, *_ = [
        LLCConfig.parse(data)
        for data in expand(load_sweep(SWEEPS / "analysis" / f"{ESTIMATES['llc_calibrated'][0]}.yaml"))
    ]
    assert run.needed("llc_calibrated")["step"].tolist() == list(asked.steps)
