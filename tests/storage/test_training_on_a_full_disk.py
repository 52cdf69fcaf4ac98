"""A disk that fills up during training: one clear line, nothing lost, and the run goes on once there is room."""

import subprocess
from pathlib import Path

import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.jobs import Surroundings, run_training
from icl.runs import verify_run
from icl.storage import LocalStore, StorageError

CONFIG = {
    "task_config": {
        "task_size": 3, "max_examples": 5, "num_tasks": "inf", "embed_size": 14, "mlp_size": 11, "num_heads": 2,
        "num_layers": 2, "model_seed": 1,
    },
    "num_steps": 40,
    "batch_size": 13,
    "eval_batch_size": 17,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 40}, "state_every": 3},
}  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MiB, nearly filled by a file called ballast."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root; tests/storage/test_local.py fills a disk without one")
    (folder / "ballast").write_bytes(bytes(1700 * 1024))
    yield folder
    subprocess.run(["umount", folder], check=True)


def train(root: Path) -> bool:
    place = Surroundings(LocalStore(root), root / "icl", torch.device("cpu"), tracking="none")
    return run_training(TrainingConfig.parse(CONFIG), place).finished


def test_a_run_survives_a_disk_that_fills_up(small_disk, tmp_path):
    with pytest.raises(StorageError, match=r"the disk is full; free some space or set LOCAL_ROOT") as caught:
        train(small_disk)
    assert "\n" not in str(caught.value)
    name = TrainingConfig.parse(CONFIG).name
    run = Checkpoints(LocalStore(small_disk), name)
    assert verify_run(run.store, name) == []
    assert run.newest_state() is not None
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "ballast").unlink()
    assert train(small_disk)
    assert train(tmp_path / "whole")
    whole = LocalStore(tmp_path / "whole")
    assert {key: whole.get(key) for key in whole.list("icl")} == {
        key: run.store.get(key) for key in run.store.list("icl")
    }
