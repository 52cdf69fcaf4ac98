"""A table over seeds: which runs belong together, and their mean, standard deviation and number."""

import json
import math

import pytest

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.execution.seeds import spread, summaries_of_seeds
from icl.storage import LocalStore


def config(seed: int, **others) -> TrainingConfig:
    task = {"task_size": 2, "max_examples": 3, "embed_size": 4, "num_heads": 2, "num_layers": 1, "model_seed": seed}
    unset = dict.fromkeys(("pretrain_seed", "true_seed", "sampling_seed"))
    return TrainingConfig.parse({"task_config": {**task, **unset}, "num_steps": 7, **others}).resolved()


def finished(store: LocalStore, run: TrainingConfig, status: str, **numbers) -> None:
    Checkpoints(store, run.name).save_config(run.model_dump(mode="json"))
    store.put(f"icl/{run.name}/summary.json", json.dumps({"status": status, **numbers}).encode())


def test_mean_standard_deviation_and_number():
    rows = spread([{"a": 1.0, "b": 5, "text": "x"}, {"a": 2.0, "b": 5, "text": "x"}, {"a": 6.0, "b": 5}])
    assert rows == [("a", 3.0, pytest.approx(math.sqrt(7)), 3), ("b", 5.0, 0.0, 3)]


def test_one_run_has_no_standard_deviation():
    assert spread([{"a": 2.5}]) == [("a", 2.5, None, 1)]


def test_runs_that_ended_and_differ_only_in_their_seeds_belong_together(tmp_path):
    store = LocalStore(tmp_path)
    for seed, status in enumerate(["finished", "running", "failed", "interrupted"]):
        finished(store, config(seed), status, loss=seed)
    finished(store, config(5, logger_config={"loss_every": 3}), "finished", loss=5)
    finished(store, config(6, optimizer_config={"lr": 0.5}), "finished", loss=6)
    finished(store, config(7, run_name="by-hand"), "finished", loss=7)
    (tmp_path / "icl" / "unknown").mkdir()
    (tmp_path / "icl" / "unknown" / "config.json").write_text('{"colour": "red"}')
    assert sorted(each["loss"] for _, each in summaries_of_seeds(config(0), store)) == [0, 1, 5]
    named = config(8, run_name="another")
    assert sorted(each["loss"] for _, each in summaries_of_seeds(named, store)) == [0, 1, 5, 7]
