"""A run that goes on with another engine says so, and its states keep who did what."""

import os
import signal

import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.native.build import NativeUnavailable, find_compiler
from icl.storage import LocalStore, StorageError
from icl.training import loop
from icl.training.engines import ENGINES

CONFIG = {
    "task_config": {
        "task_size": 2, "max_examples": 3, "num_tasks": "inf", "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1,
        "model_seed": 1,
    },
    "num_steps": 20,
    "batch_size": 3,
    "eval_batch_size": 7,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 10}, "state_every": 5},
    "logger_config": {"logging_steps": {"linear_space": 3}, "loss_every": 1},
    "run_name": "a",
}  # fmt: skip


@pytest.fixture
def engine(monkeypatch):
    """Sets the name of the engine of what follows, which is always PyTorch."""

    def choose(name):
        def path(shape, device, threads, **precision):
            return torch_path.__class__(name, "", torch_path.run, torch_path.predict)

        monkeypatch.setattr(loop, "choose_path", path)

    torch_path = loop.choose_path(TrainingConfig.parse(CONFIG).task_config.shape, native="never")
    return choose


@pytest.fixture
def at_step(monkeypatch):
    """Calls a function once, before the update of a step."""
    from icl.training.optimizers import FlatOptimizer

    update, due = FlatOptimizer.update, {}

    def updated(self, gradient, rates):
        due["now"] = due.get("now", -1) + 1
        if due["now"] in due:
            due.pop(due["now"])()
        return update(self, gradient, rates)

    monkeypatch.setattr(FlatOptimizer, "update", updated)
    return lambda step, action: due.update({"now": -1, step: action})


def train(root):
    place = Surroundings(LocalStore(root), root / "icl", torch.device("cpu"), tracking="local")
    return run_training(TrainingConfig.parse(CONFIG), place)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def engines_of(root):
    state = Checkpoints(LocalStore(root), "a").newest_state()
    assert state is not None
    return state.metadata[ENGINES]


def test_another_engine_is_told_and_kept(tmp_path, engine, at_step, caplog):
    engine("native")
    at_step(7, stop)
    assert train(tmp_path).steps_done == 8
    assert engines_of(tmp_path) == [[0, "native"]]
    assert not caplog.records
    engine("torch")
    at_step(3, stop)
    assert train(tmp_path).steps_done == 12
    assert engines_of(tmp_path) == [[0, "native"], [8, "torch"]]
    (record,) = caplog.records
    assert "continues at step 8 with the engine torch; the steps before were done by native" in record.getMessage()
    assert "\n" not in record.getMessage()
    caplog.clear()
    assert train(tmp_path).finished
    assert not caplog.records
    assert engines_of(tmp_path) == [[0, "native"], [8, "torch"]]


def test_a_run_that_keeps_its_engine_ends_in_the_same_files(tmp_path, at_step):
    assert train(tmp_path / "whole").finished
    at_step(7, stop)
    assert not train(tmp_path / "halves").finished
    assert train(tmp_path / "halves").finished

    def files(root):
        return {
            path.name: path.read_bytes() for path in root.rglob("*.*") if path.is_file() and ".lock" not in path.name
        }

    assert files(tmp_path / "whole") == files(tmp_path / "halves")


def test_the_compiled_engine_is_called_native(tmp_path):
    try:
        find_compiler()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    if os.environ.get("ICL_NATIVE") == "0":
        pytest.skip("turned off")
    assert train(tmp_path).finished
    assert engines_of(tmp_path) == [[0, "native"]]


def test_a_writer_whose_lock_was_removed_writes_no_state_over_anothers(tmp_path, at_step):
    states = {}

    def second_writer():
        (tmp_path / "icl" / "a" / ".lock").unlink()
        at_step(10**9, stop)
        assert train(tmp_path).finished
        states.update({path: path.read_bytes() for path in tmp_path.rglob("state-*")})

    at_step(7, second_writer)
    with pytest.raises(StorageError, match="was removed while this process wrote the run a"):
        train(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("state-*")} == states
