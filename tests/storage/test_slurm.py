"""examples/slurm.sh as it stands, under a stand-in for SLURM: a job array, preemption, time limits, another node.

The stand-in does what SLURM documents: it reads the script's `#SBATCH` lines, starts the script once per index with the
variables of the task, signals the step (what `srun` started) and not the script, and starts a task again if the script asks
for it by `scontrol requeue`.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from icl.native.build import cache_folder
from icl.storage import S3Store

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
PATIENCE_S = 900
STEPS = 3000


def sweep(steps: int) -> dict:
    """Two seeds."""
    sizes = {"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 2, "num_layers": 1}
    task = {key: {"value": value} for key, value in {**sizes, "num_tasks": "inf"}.items()}
    rest = {
        **{"num_steps": steps, "batch_size": 7, "eval_batch_size": 11},
        "checkpointer_config": {"checkpoint_steps": {"linear_space": 5}, "state_every": 10**6},
        "logger_config": {"logging_steps": {"linear_space": 5}, "loss_every": 10},
    }
    parameters = {"task_config": {"parameters": {**task, "model_seed": {"values": [0, 1]}}}}
    return {"method": "grid", "parameters": {**parameters, **{key: {"value": value} for key, value in rest.items()}}}


@dataclass
class Task:
    """One task of the array: how often it was started, where it is, and how each start ended."""

    index: int
    job: int
    restarts: int = -1
    node: Path | None = None
    process: subprocess.Popen[str] | None = None
    statuses: list[int] = field(default_factory=list)


class Slurm:
    """A cluster whose nodes are folders. `srun` and `scontrol` are programs on its PATH."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.requeued = folder, folder / "requeued"
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name, text in {
            "srun": f'echo $$ > "{folder}/step-$SLURM_JOB_ID"; exec "$@"',
            "scontrol": f'[ "$1" = requeue ] && echo "$2" >> "{self.requeued}"',
            "sleep": f'echo "$1" >> "{folder}/slept"',
            "icl": f'exec {sys.executable} -m icl "$@"',
        }.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "SLURM_"))}
        self.environment = {
            **kept,
            "PATH": f"{programs}:{kept['PATH']}",
            "PYTHONPATH": str(SCRIPT.parents[1]),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(cache_folder().parent),
            "DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        # What the script asks for.
        lines = re.findall(r"^#SBATCH (--\S+)", SCRIPT.read_text(), re.MULTILINE)
        self.options = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
        self.tasks: list[Task] = []
        self._nodes = 0

    def sbatch(self, *words: str) -> None:
        """Queue a job array."""
        array = next(word for word in words if word.startswith("--array="))
        first, last = map(int, array.removeprefix("--array=").split("-"))
        assert words[1] == SCRIPT.name
        self._words = [str(SCRIPT), *words[2:]]
        self.tasks = [Task(index, 100 + index) for index in range(first, last + 1)]
        for task in self.tasks:
            self._start(task)

    def _start(self, task: Task) -> None:
        """Start a task on a node of its own, with an empty disk."""
        self._nodes += 1
        task.node, task.restarts = self.folder / f"node-{self._nodes}", task.restarts + 1
        task.node.mkdir()
        (task.node / "mine.yaml").write_text((self.folder / "mine.yaml").read_text())
        own = {
            "SLURM_ARRAY_TASK_ID": str(task.index),
            "SLURM_JOB_ID": str(task.job),
            "SLURM_RESTART_COUNT": str(task.restarts),
        }
        (self.folder / f"step-{task.job}").unlink(missing_ok=True)
        with (self.folder / f"log-{task.index}").open("a") as log:
            task.process = subprocess.Popen(
                ["bash", *self._words], cwd=task.node, env=self.environment | own, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def signal_step(self, task: Task, number: signal.Signals) -> None:
        """Signal what `srun` started."""
        os.kill(int((self.folder / f"step-{task.job}").read_text()), number)

    def log(self, task: Task) -> str:
        return (self.folder / f"log-{task.index}").read_text()

    def run(self) -> None:
        """Wait until every task has ended for good. Those that ask for it are started again."""
        end = time.monotonic() + PATIENCE_S
        while any(task.process is not None for task in self.tasks):
            assert time.monotonic() < end, [self.log(task) for task in self.tasks]
            time.sleep(0.05)
            for task in self.tasks:
                if task.process is not None and task.process.poll() is not None:
                    task.statuses.append(task.process.returncode)
                    task.process = None
                    waiting = self.requeued.read_text().split() if self.requeued.exists() else []
                    if waiting.count(str(task.job)) > task.restarts:
                        assert "requeue" in self.options
                        self._start(task)


def contents(bucket: str) -> dict[str, bytes]:
    """All files of runs that do not tell of a place or a time."""
    store = S3Store(bucket, listing_lifetime_s=0.0)
    return {key: store.get(key) for key in store.list("icl") if not key.endswith((".log", "sweep.yaml"))}


def wait_for_progress(slurm: Slurm, task: Task) -> None:
    """Wait until a task has trained some steps."""
    end = time.monotonic() + PATIENCE_S
    assert task.node is not None
    while not any(
        len(path.read_text().splitlines()) > 20 for path in task.node.glob("checkpoints/icl/*/metrics.jsonl")
    ):
        assert task.process is not None
        assert task.process.poll() is None, slurm.log(task)
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_script_asks_for_requeueing_and_a_warning():
    slurm_options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", SCRIPT.read_text(), re.MULTILINE))
    assert slurm_options["requeue"] == ""
    name, _, seconds = slurm_options["signal"].partition("@")
    assert hasattr(signal, f"SIG{name}")
    assert int(seconds) >= 60
    assert slurm_options["open-mode"] == "append"
    for line in re.findall(r"^#   (sbatch .*)", SCRIPT.read_text(), re.MULTILINE):
        assert shlex.split(line)[2:4] in (["slurm.sh", "train"], ["slurm.sh", "llc"])


@pytest.mark.slow
def test_preempted_tasks_go_on_on_other_nodes_and_leave_the_bytes_of_undisturbed_ones(tmp_path, s3_environment):
    import boto3

    client = boto3.session.Session().client("s3")
    found = {}
    for name in ("quiet", "disturbed"):
        client.create_bucket(Bucket=f"slurm-{name}")
        slurm = Slurm(tmp_path / name, {"AWS_BUCKET_NAME": f"slurm-{name}"})
        (tmp_path / name / "mine.yaml").write_text(yaml.safe_dump(sweep(STEPS)))
        slurm.sbatch("--array=0-1", "slurm.sh", "train", "mine.yaml")
        if name == "disturbed":
            for task, number in zip(slurm.tasks, (signal.SIGTERM, signal.SIGUSR1), strict=True):
                wait_for_progress(slurm, task)
                slurm.signal_step(task, number)
        slurm.run()
        assert (tmp_path / name / "slept").exists() == (name == "disturbed")
        expected = [75, 0] if name == "disturbed" else [0]
        assert [task.statuses for task in slurm.tasks] == [expected] * 2, [slurm.log(task) for task in slurm.tasks]
        found[name] = contents(f"slurm-{name}")
    assert {json.loads(data)["status"] for key, data in found["quiet"].items() if key.endswith("summary.json")} == {
        "finished"
    }
    assert len([key for key in found["quiet"] if key.endswith("/config.json")]) == 2
    assert found["disturbed"] == found["quiet"]


@pytest.mark.slow
def test_a_task_that_cannot_work_is_not_started_again(tmp_path):
    slurm = Slurm(tmp_path / "cluster", {})
    (tmp_path / "cluster" / "mine.yaml").write_text(yaml.safe_dump(sweep(STEPS)))
    slurm.sbatch("--array=1-2", "slurm.sh", "train", "mine.yaml", "--set", "num_steps=3")
    slurm.run()
    assert [task.statuses for task in slurm.tasks] == [[0], [2]]
    assert "--index 2 is outside this sweep" in slurm.log(slurm.tasks[1])
