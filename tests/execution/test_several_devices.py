"""A sweep on several accelerators: each process has one of them to itself. The accelerators are a stand-in; the runs are real."""

import os
from pathlib import Path

import pytest
import torch

from icl.commands.sweep import run_sweep_command
from icl.config import TrainingConfig
from icl.config.sweeps import expand, load_sweep
from icl.execution import sweep as execution
from icl.execution.local import LocalProcess
from icl.execution.names import by_name
from icl.execution.surroundings import Surroundings
from icl.execution.sweep import least_busy, run_sweep
from icl.execution.training_runs import batches
from icl.tracking import read_metrics

GPUS = [torch.device("cuda", index) for index in range(2)]
SWEEP = """\
method: grid
command: ["${env}", "icl", "train"]
parameters:
  task_config: {parameters: {task_size: {value: 2}, max_examples: {value: 3}, num_tasks: {value: inf}, embed_size: {value: 4},
      mlp_size: {value: 5}, num_heads: {value: 2}, num_layers: {value: 1}, model_seed: {values: [0, 1, 2]}}}
  num_steps: {value: 30}
  batch_size: {value: 7}
  eval_batch_size: {value: 11}
"""
Started = list[tuple[str, tuple[str, ...]]]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Surroundings:
    (tmp_path / "mine.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    for key in [key for key in os.environ if key.startswith(("WANDB", "AWS", "ICL_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "checkpoints"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("DEVICE", "cpu")
    return Surroundings.from_environment(tracking="local")


@pytest.fixture
def started(monkeypatch) -> Started:
    """Two GPUs, and what each process is told. It then computes on the CPU after all."""
    told: Started = []

    class Process(LocalProcess):
        def __init__(self, command, log, environment):
            told.append((environment["DEVICE"], tuple(command)))
            super().__init__(command, log, environment | {"DEVICE": "cpu"})

    monkeypatch.setattr(execution, "devices_for_runs", lambda device: GPUS)
    monkeypatch.setattr(execution, "runs_at_once", lambda device: len(GPUS))
    monkeypatch.setattr(execution, "LocalProcess", Process)
    return told


def points(path: str = "mine.yaml") -> list[TrainingConfig]:
    return [TrainingConfig.parse(data) for data in expand(load_sweep(path))]


def test_a_process_gets_the_device_that_the_fewest_have():
    assert least_busy(GPUS, []) == GPUS[0]
    assert least_busy(GPUS, [GPUS[0]]) == GPUS[1]
    assert least_busy(GPUS, [GPUS[1], GPUS[0], GPUS[1]]) == GPUS[0]


def test_each_run_has_a_device_of_its_own(place, started):
    assert run_sweep("train", points(), place, None, "local") == 0
    assert sorted(device for device, _ in started[:2]) == ["cuda:0", "cuda:1"]
    assert len(started) == 3
    assert {len(read_metrics(place.results / name)) > 0 for name in by_name(points())} == {True}


@pytest.mark.parametrize(("seeds", "rates", "parts", "sizes"), [
    (5, 1, 1, [5]), (5, 1, 2, [3, 2]), (5, 1, 8, [1] * 5), (3, 2, 2, [3, 3]), (3, 2, 4, [2, 1, 2, 1]),
])  # fmt: skip
def test_groups_of_seeds_are_divided_only_if_devices_would_be_idle(seeds, rates, parts, sizes):
    configs = [
        TrainingConfig.parse({"task_config": {"model_seed": seed}, "optimizer_config": {"lr": 0.1 / (rate + 1)}})
        for rate in range(rates)
        for seed in range(seeds)
    ]
    groups = batches(configs, parts)
    assert [len(group) for group in groups] == sizes
    assert sorted(config.name for group in groups for config in group) == sorted(config.name for config in configs)
    assert all(len({config.optimizer_config.lr for config in group}) == 1 for group in groups)


def test_a_group_of_seeds_trains_as_one_batch_on_each_device(place, started, monkeypatch):
    monkeypatch.setattr("icl.commands.sweep.devices_for_runs", lambda device: GPUS)
    assert run_sweep_command("train", Path("mine.yaml"), None, [], None, "batch", "local") == 0
    assert [device for device, _ in started] == ["cuda:0", "cuda:1"]
    groups = [points(next(word for word in command if word.endswith(".yaml"))) for _, command in started]
    assert [[config.task_config.model_seed for config in group] for group in groups] == [[0, 2], [1]]
    assert all("batch" in command for _, command in started)
    for config in points():
        assert place.checkpoints(config).finished_step() == 29
    started.clear()
    assert run_sweep_command("train", Path("mine.yaml"), None, [], None, "batch", "local") == 0
    assert started == []
