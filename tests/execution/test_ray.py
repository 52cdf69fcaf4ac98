"""The offline grid on a local Ray cluster of two nodes, one of whose workers is killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from icl.config import ConfigError
from icl.tracking import read_metrics

STEPS = 6000


def sweep() -> dict:
    grid = {"parameters": {"log_space": {"value": 3}, "linear_space": {"value": 3}}}
    task = {
        "task_size": 2,
        "max_examples": 3,
        "embed_size": 4,
        "mlp_size": 5,
        "num_heads": 2,
        "num_layers": 1,
        "num_tasks": "inf",
    }
    parameters = {key: {"value": value} for key, value in task.items()}
    return {
        "method": "grid",
        "parameters": {
            "task_config": {"parameters": {**parameters, "model_seed": {"values": [0, 1, 2]}}},
            "checkpointer_config": {"parameters": {"checkpoint_steps": grid, "state_every": {"value": 200}}},
            "logger_config": {"parameters": {"logging_steps": grid, "loss_every": {"value": 10}}},
            "num_steps": {"value": STEPS},
            "batch_size": {"value": 7},
            "eval_batch_size": {"value": 11},
        },
    }


def start(folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep()))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "AWS_", "RAY_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "icl", "train", "sweep.yaml", *options],
        cwd=folder,
        env={**kept, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_ROOT": "checkpoints", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def runs(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in folder.glob("checkpoints/icl/*/metrics.jsonl")}


def holder(folder: Path) -> int | None:
    """The process that trains the first run that is well under way."""
    for run in runs(folder).values():
        if len(read_metrics(run)) > 60:
            note = run / ".lock-holder.json"
            return json.loads(note.read_text())["pid"] if note.exists() else None
    return None


@pytest.fixture
def cluster():
    """Two nodes of one CPU each, as processes of this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_killed_workers_run_goes_on_elsewhere_and_ends_in_the_same_bytes(cluster, tmp_path):
    process = start(tmp_path / "ray", "--executor", "ray", RAY_ADDRESS=cluster.address)
    deadline = time.monotonic() + 400
    while (worker := holder(tmp_path / "ray")) is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "3 done" in said
    local = start(tmp_path / "local")
    assert local.wait(timeout=300) == 0
    local.communicate()
    here, there = runs(tmp_path / "ray"), runs(tmp_path / "local")
    assert len(here) == 3
    assert set(here) == set(there)
    for name, run in here.items():
        for file in ("metrics.jsonl", "summary.json", f"{STEPS - 1}.safetensors"):
            assert (run / file).read_bytes() == (there[name] / file).read_bytes()


@pytest.mark.slow
def test_without_a_cluster_the_error_says_how_to_start_one(tmp_path):
    process = start(tmp_path / "none", "--executor", "ray", RAY_ADDRESS="127.0.0.1:1")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "ray start --head" in said.splitlines()[-1]


def test_an_unknown_executor_is_refused(tmp_path):
    from icl.execution.surroundings import Surroundings
    from icl.execution.sweep import run_sweep

    with pytest.raises(ConfigError, match="--executor must be local, batch"):
        run_sweep("train", [], Surroundings.from_environment({"DEVICE": "cpu"}), None, "slurm")
