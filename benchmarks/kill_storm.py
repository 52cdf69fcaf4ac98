"""Kill training with SIGKILL at random moments, again and again, and count what was lost: nothing must be.

    python benchmarks/kill_storm.py 200

A small run writes weights at every step and its full state at every second one, so that many kills fall into a write.
After each kill: is every visible checkpoint whole, is the lock free, are the temporary files gone after the next start?
Whenever a run reaches its end, its files are compared, byte for byte, with those of a run that nobody killed.
Exit status 1 if anything was lost.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from icl.checkpoints import Checkpoints
from icl.checkpoints.runs import verify_run
from icl.config import TrainingConfig
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore

CONFIG = {
    "task_config": {
        "task_size": 3, "max_examples": 5, "num_tasks": "inf", "embed_size": 14, "mlp_size": 11, "num_heads": 2, "num_layers": 2,
        "model_seed": 1,
    },
    "num_steps": 60,
    "batch_size": 13,
    "eval_batch_size": 17,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 60}, "state_every": 2},
    "logger_config": {"logging_steps": {"linear_space": 10}, "loss_every": 5},
}  # fmt: skip


def train_here(config: TrainingConfig, root: Path) -> bool:
    place = Surroundings(LocalStore(root), root / "icl", torch.device("cpu"), tracking="local")
    return run_training(config, place).finished


def start_training(config: TrainingConfig, root: Path) -> int:
    """Train in a child process; a fork, because starting Python anew would take longer than the run."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        status = 0 if train_here(config, root) else 1
    finally:
        os._exit(status)


def contents(root: Path) -> dict[str, bytes]:
    """All files of a run but its lock's, which name the process."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def inspect(config: TrainingConfig, root: Path, totals: Counter[str]) -> None:
    """Count what a kill left behind, before and after the next start."""
    store = LocalStore(root)
    totals["kills inside a write"] += any(root.rglob("*.tmp"))
    totals["damaged files"] += len(verify_run(store, config.name))
    run = Checkpoints(store, config.name)
    states, newest = run.states(), run.newest_state()
    totals["unreadable newest states"] += bool(states) and (newest is None or newest.step != states[-1])
    with run.lock(wait_s=0):
        totals["temporary files after the next start"] += len(list(root.rglob("*.tmp")))


def storm(kills: int, seed: int, folder: Path) -> Counter[str]:
    config = TrainingConfig.parse(CONFIG)
    draw, totals = random.Random(seed), Counter[str]()
    whole, root = folder / "whole", folder / "killed"
    train_here(config, whole)  # in this process, so that its children need not import anything
    expected = contents(whole)
    shutil.rmtree(whole)
    start = time.monotonic()
    os.waitpid(start_training(config, whole), 0)
    duration = time.monotonic() - start
    while totals["kills"] < kills:
        child = start_training(config, root)
        time.sleep(draw.uniform(0, 0.5) * duration)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            totals["kills"] += 1
            inspect(config, root, totals)
        elif os.WEXITSTATUS(status):
            totals["starts that failed"] += 1
            shutil.rmtree(root)
        else:
            totals["runs that reached their end"] += 1
            totals["runs that differ from the one nobody killed"] += contents(root) != expected
            shutil.rmtree(root)
    return totals


LOSSES = (
    "damaged files",
    "unreadable newest states",
    "temporary files after the next start",
    "starts that failed",
    "runs that differ from the one nobody killed",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        totals = storm(arguments.kills, arguments.seed, Path(folder))
    for name in ("kills", "kills inside a write", "runs that reached their end", *LOSSES):
        print(f"{totals[name]:6}  {name}")
    return 1 if any(totals[name] for name in LOSSES) else 0


if __name__ == "__main__":
    sys.exit(main())
