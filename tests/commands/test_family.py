"""From the runs of a training sweep over the number of tasks to the figures of the family."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from icl.analysis.data import ROOT_SIZE, AnalysisData
from icl.analysis.family import analyse_family
from icl.analysis.run import config_of, load_model
from icl.baselines import dmmse_predictor, ridge_predictor
from icl.checkpoints import Checkpoints
from icl.commands.analyse import analyse_family_command
from icl.commands.sweep import run_sweep_command
from icl.config import ConfigError
from icl.figures import build
from icl.figures.build import build_figures
from icl.figures.families import read_tables
from icl.storage import LocalStore

pytestmark = pytest.mark.xdist_group("family")  # the runs that all of these look at are trained once

SWEEP = """\
method: grid
command: ["${env}", "icl", "train"]
parameters:
  task_config:
    parameters:
      task_size: {value: 3}
      max_examples: {value: 5}
      num_tasks: {values: [4, inf, 1]}
      embed_size: {value: 14}
      mlp_size: {value: 11}
      num_heads: {value: 2}
      num_layers: {value: 1}
      model_seed: {value: 1}
  num_steps: {value: 12}
  batch_size: {value: 13}
  eval_batch_size: {value: 17}
  checkpointer_config:
    parameters:
      checkpoint_steps: {value: {linear_space: 4}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a sweep file and the checkpoints of its runs."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "tiny.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_ROOT", str(folder / "checkpoints"))
        patch.setenv("DEVICE", "cpu")
        patch.delenv("AWS_BUCKET_NAME", raising=False)
        for index in range(3):  # one at a time, and so in this process
            assert run_sweep_command("train", folder / "tiny.yaml", index, [], 1, "local", "none") == 0
    return folder


def environment(folder):
    return {"LOCAL_ROOT": str(folder / "checkpoints"), "DEVICE": "cpu"}


@pytest.fixture(scope="module")
def family(trained):
    """The folder of the family's tables."""
    analyse_family_command(trained / "tiny.yaml", [], None, trained / "data" / "tiny", environment(trained))
    return trained / "data" / "tiny"


def runs_of(trained):
    names = sorted(path.name for path in (trained / "checkpoints" / "icl").iterdir())
    return [Checkpoints(LocalStore(trained / "checkpoints"), name) for name in names]


def test_tables_have_every_checkpoint_of_every_run(trained, family):
    tables = read_tables(family)
    assert set(tables) == {"task_prior", "transient_distances", "transient_scores", "transient_references"}
    steps = runs_of(trained)[0].steps()
    for name in ("task_prior", "transient_distances", "transient_scores"):
        assert tables[name].columns[:2].tolist() == ["num_tasks", "step"]
        expected = [(tasks, step) for tasks in (1, 4, math.inf) for step in steps]
        assert list(tables[name][["num_tasks", "step"]].itertuples(index=False, name=None)) == expected
        described = json.loads((family / f"{name}.json").read_text())
        assert set(described["runs"]) == {"1", "4", "inf"}
        assert described["task_config"]["model_seed"] == 1
    assert tables["transient_distances"].isna().any(axis=1).sum() == len(steps)  # Gaussian tasks have no dMMSE


def test_scores_are_those_of_all_predictions_together(trained, family):
    runs = {config_of(run).task_config.num_tasks or math.inf: run for run in runs_of(trained)}
    config = config_of(runs[4])
    task = config.task_config.model_copy(update={"num_tasks": 1}).pretrain_task()
    table = read_tables(family)["transient_scores"]
    xs, ys = AnalysisData(config).root_sequences
    assert len(xs) == ROOT_SIZE
    np.testing.assert_array_equal(task.tasks, config.task_config.pretrain_task().tasks[:1])
    rows = [
        load_model(run, config_of(run), step)(xs, ys).detach().flatten().numpy()
        for _, run in sorted(runs.items())
        for step in run.steps()
    ]
    matrix = np.stack(rows).astype(float)
    centred = matrix - matrix.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(table["explained_variance_ratio/0"], singular[0] ** 2 / (singular**2).sum(), rtol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(table["pc/0"]), singular[0], rtol=1e-2)
    references = read_tables(family)["transient_references"].set_index(["predictor", "num_tasks"])
    direction = np.linalg.lstsq(table[["pc/0"]].to_numpy(), centred, rcond=None)[0]
    direction = (direction / np.linalg.norm(direction)).ravel()
    noise = config.task_config.noise_variance
    ideal = {
        ("ridge", math.inf): ridge_predictor(xs, ys, noise),
        ("dmmse", 4.0): dmmse_predictor(xs, ys, config.task_config.pretrain_task().tasks, noise),
    }
    for key, predictions in ideal.items():
        expected = float((predictions.flatten().numpy() - matrix.mean(axis=0)) @ direction)
        assert references.loc[key, "pc/0"] == pytest.approx(expected, abs=0.02 * singular[0])


def test_every_figure_of_the_family_is_drawn(family, tmp_path, monkeypatch):
    lines: list[str] = []

    def draw_only(figure, folder, name):  # the encoding of files is tested with the figures of a run
        figure.draw_without_rendering()
        return [folder / f"{name}.png"]

    monkeypatch.setattr(build, "save", draw_only)
    written = build_figures(family.parent, tmp_path, lines.append)
    assert {path.stem for path in written} == {
        "task-prior",
        "memorisation-map",
        "transient-losses",
        "transient-distances",
        "transient-trajectories",
    }
    assert {path.parent.name for path in written} == {"tiny"}
    assert not [line for line in lines if line.startswith(("left out tiny/transient", "left out tiny/task-prior"))]


def test_what_is_measured_is_not_measured_again(trained, family, tmp_path):
    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}

    before = files(family)
    seen = []
    analyse_family(runs_of(trained), family, progress=lambda *said: seen.append(said))
    assert {total for _, _, total in seen} == {0}
    assert files(family) == before
    # A family that grows, or shrinks, has its joint components made afresh.
    analyse_family(runs_of(trained)[:2], tmp_path / "grown")
    analyse_family(runs_of(trained), tmp_path / "grown")
    assert files(tmp_path / "grown") == before


def test_runs_that_are_no_family_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"no analysis 'hessian' of families; known: task_prior"):
        analyse_family_command(trained / "tiny.yaml", [], ["hessian"], tmp_path, environment(trained))
    with pytest.raises(ConfigError, match=r"no run of .* has checkpoints; make them with: icl train"):
        analyse_family_command(trained / "tiny.yaml", ["num_steps=13"], None, tmp_path, environment(trained))
    one = runs_of(trained)[0]
    with pytest.raises(ConfigError, match="the same num_tasks"):
        analyse_family([one, one], tmp_path)
    other = Checkpoints(LocalStore(tmp_path), "other")
    stored = one.config()
    assert stored is not None
    other.save_config({**stored, "num_steps": 13})
    other.save(0, one.load(0))
    with pytest.raises(ConfigError, match="these differ in num_steps: 12 and 13"):
        analyse_family([one, other], tmp_path)


def test_a_run_without_checkpoints_is_left_out(trained, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text(SWEEP.replace("[4, inf, 1]", "[4, 2]"))
    (path,) = analyse_family_command(tmp_path / "more.yaml", [], ["task_prior"], tmp_path, environment(trained))
    assert set(pd.read_csv(path)["num_tasks"]) == {4}
    assert "left out L1H2M2-" in capsys.readouterr().err
