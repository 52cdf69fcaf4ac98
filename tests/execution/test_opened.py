"""Runs as things: what the commands left, read from Python."""

import pandas as pd
import pytest
import torch

import icl
from icl.checkpoints import CheckpointError, Checkpoints, DamagedCheckpointError
from icl.config import ConfigError, TrainingConfig
from icl.config.varying import varying
from icl.storage import LocalStore
from icl.tracking.trackers import LocalTracker
from icl.training.loop import train

SWEEP = """\
method: grid
parameters:
  task_config:
    parameters:
      task_size: {value: 3}
      max_examples: {value: 5}
      num_tasks: {value: inf}
      embed_size: {value: 14}
      mlp_size: {value: 11}
      num_layers: {value: 1}
      pretrain_seed: {value: null}
      true_seed: {value: null}
      sampling_seed: {value: null}
      model_seed: {values: [1, 2]}
  optimizer_config:
    parameters:
      lr: {values: [0.01, 0.002]}
  num_steps: {value: 7}
  batch_size: {value: 13}
  eval_batch_size: {value: 17}
  checkpointer_config: {parameters: {checkpoint_steps: {value: [0, 3]}}}
  logger_config: {parameters: {logging_steps: {value: [0, 3]}, loss_every: {value: 2}}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from icl.config.sweeps import expand, load_sweep

    folder = tmp_path_factory.mktemp("opened")
    (folder / "mine.yaml").write_text(SWEEP)
    for data in expand(load_sweep(folder / "mine.yaml")):
        config = TrainingConfig.parse(data).resolved()
        checkpoints = Checkpoints(LocalStore(folder), config.name)
        with checkpoints.lock():
            checkpoints.save_config(config.model_dump(mode="json"))
            tracker = LocalTracker(folder / "icl" / config.name)
            train(config, checkpoints, tracker)
            tracker.finish()
            checkpoints.mark_finished(config.num_steps - 1)
    return folder


@pytest.fixture(autouse=True)
def place(root, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(root))


def test_the_runs_of_a_sweep_carry_the_settings_that_vary_and_no_seed_that_follows_from_another(root):
    runs = icl.open_runs(root / "mine.yaml")
    assert len(runs) == 4
    assert set(runs.differing) == {"task_config.model_seed", "optimizer_config.lr"}
    groups = runs.metrics.groupby(list(runs.differing))
    assert sorted(key for key, _ in groups) == [(seed, lr) for seed in (1, 2) for lr in (0.002, 0.01)]
    for _, rows in groups:
        assert rows["run"].nunique() == 1
        assert list(rows["step"]) == [0, 2, 3, 4, 6]
    assert runs.config.set_index("run").loc[runs[0].name, "optimizer_config.lr"] in (0.01, 0.002)
    assert pd.api.types.is_integer_dtype(runs.metrics["task_config.model_seed"])


def test_a_run_is_opened_by_its_name_or_its_folder_and_gives_its_models(root):
    first = icl.open_runs(root / "mine.yaml")[0]
    for run in (icl.open_run(first.name), icl.open_run(root / "icl" / first.name)):
        assert run.steps == [0, 3, 6]
        assert run.finished
        assert run.summary["status"] == "finished"
        model = run.model(6)
        xs = torch.zeros(2, 5, 3)
        assert model(xs, torch.zeros(2, 5, 1)).shape == (2, 5, 1)
        assert run.estimates.empty
        assert run.config["optimizer_config.lr"].item() == run.settings.optimizer_config.lr
        assert isinstance(run.metrics, pd.DataFrame)


def test_a_step_that_was_never_saved_is_no_damage(root):
    run = icl.open_runs(root / "mine.yaml")[0]
    with pytest.raises(CheckpointError, match="no checkpoint at step 5000; the nearest is at step 6") as caught:
        run.model(5000)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_a_name_that_is_not_there_is_refused_with_the_nearest(root):
    name = icl.open_runs(root / "mine.yaml")[0].name
    with pytest.raises(ConfigError, match=f"did you mean {name}"):
        icl.open_run(name[:-1])


def test_settings_that_vary_are_found_at_any_depth_and_where_some_runs_lack_them():
    told = [{"a": 1, "b": {"c": 2, "d": 5}}, {"a": 1, "b": {"c": 3, "d": 5}}, {"a": 1, "b": {"c": 3}, "run_name": "x"}]
    assert varying(told) == ["b.c", "b.d"]
    assert varying(told[:1]) == varying([]) == []
