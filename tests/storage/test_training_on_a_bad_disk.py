"""A disk that fills up, a folder that is read-only, a clock that jumps: one clear line, nothing lost, and on it goes."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.checkpoints.runs import verify_run
from icl.config import TrainingConfig
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore, MirroredStore, S3Store, StorageError

CONFIG = {
    "task_config": {
        "task_size": 3, "max_examples": 5, "num_tasks": "inf", "embed_size": 14, "mlp_size": 11, "num_heads": 2,
        "num_layers": 2, "model_seed": 1,
    },
    "num_steps": 40,
    "batch_size": 13,
    "eval_batch_size": 17,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 40}, "state_every": 3},
    "logger_config": {"logging_steps": {"linear_space": 5}, "loss_every": 1},
}  # fmt: skip
NAME = TrainingConfig.parse(CONFIG).name


def train(store, root: Path) -> bool:
    place = Surroundings(store, root / "icl", torch.device("cpu"), tracking="local")
    return run_training(TrainingConfig.parse(CONFIG), place).finished


def contents(store):
    return {key: store.get(key) for key in store.list("icl")}


@pytest.fixture
def whole(tmp_path):
    """The files of the run that nothing happened to."""
    store = LocalStore(tmp_path / "whole")
    assert train(store, tmp_path / "whole")
    return contents(store)


@pytest.fixture
def nearly_full(small_disk):
    """A disk of 2 MiB of which a file called ballast leaves 350 KiB: less than the run needs."""
    disk = small_disk(2048)
    (disk / "ballast").write_bytes(bytes(1698 * 1024))
    return disk


def test_a_run_survives_a_disk_that_fills_up(nearly_full, whole):
    store = LocalStore(nearly_full)
    with pytest.raises(StorageError, match=r"the disk is full; free some space or set LOCAL_ROOT") as caught:
        train(store, nearly_full)
    assert "\n" not in str(caught.value)
    assert verify_run(store, NAME) == []
    assert Checkpoints(store, NAME).newest_state() is not None
    assert not list(nearly_full.rglob("*.tmp"))
    (nearly_full / "ballast").unlink()
    assert train(store, nearly_full)
    assert contents(store) == whole


def test_with_a_bucket_a_run_goes_on_when_the_disk_is_full(nearly_full, whole, bucket, caplog):
    assert train(MirroredStore(LocalStore(nearly_full), S3Store(bucket)), nearly_full)
    in_bucket = S3Store(bucket)
    assert verify_run(in_bucket, NAME) == []
    checkpoints = {key: data for key, data in whole.items() if key.endswith((".safetensors", "finished.json"))}
    assert {key: in_bucket.get(key) for key in checkpoints} == checkpoints
    told = [record.message for record in caplog.records if "the disk is full; free some space" in record.message]
    assert sum("goes to s3://" in message for message in told) == 1


def test_a_read_only_folder_is_named_in_one_line_and_stays_as_it_is(tmp_path, read_only, whole):
    root = tmp_path / "whole"
    store = LocalStore(root)
    store.delete(f"icl/{NAME}/finished.json")
    before = contents(store)
    read_only(root)
    with pytest.raises(StorageError, match=r"cannot lock .*: the file system is read-only; set LOCAL_ROOT"):
        train(store, root)
    with pytest.raises(StorageError, match=r"cannot write .*: the file system is read-only; set LOCAL_ROOT"):
        store.put("icl/other/1", b"x")
    with pytest.raises(StorageError, match=r"cannot delete .*: the file system is read-only; set LOCAL_ROOT"):
        store.delete(f"icl/{NAME}/0.safetensors")
    assert contents(store) == before
    assert verify_run(store, NAME) == []


def test_a_clock_that_jumps_changes_no_byte(tmp_path, whole, bucket, monkeypatch):
    """Years forth and back between any two questions for the time, in training, uploading and listing."""
    jumps, real = itertools.cycle((0.0, 9e7, -9e7, 3.0, -3.0)), time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + next(jumps))
        assert train(MirroredStore(LocalStore(tmp_path / "odd"), S3Store(bucket)), tmp_path / "odd")
        assert contents(S3Store(bucket)) == whole
    assert contents(LocalStore(tmp_path / "odd")) == whole


def test_a_second_process_is_refused_in_one_line_that_names_the_holder(tmp_path):
    sweep = tmp_path / "sweep.yaml"
    parameters = "\n".join(f"  {key}: {{value: {value!r}}}" for key, value in CONFIG.items())
    sweep.write_text(f"method: grid\nparameters:\n{parameters}\n".replace("'inf'", "inf"))
    with Checkpoints(LocalStore(tmp_path / "root"), NAME).lock():
        result = subprocess.run(
            [sys.executable, "-m", "icl", "train", str(sweep)],
            env={**os.environ, "LOCAL_ROOT": str(tmp_path / "root"), "WANDB_MODE": "disabled", "AWS_BUCKET_NAME": ""},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 1
    assert f"is in use by process {os.getpid()} on " in result.stderr
    assert result.stderr.count("\n") == 1
