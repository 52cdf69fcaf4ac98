"""Machines that train one run on one bucket, as processes that can be killed, stopped and told to end."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = {
    "task_config": {
        "task_size": 3, "max_examples": 5, "num_tasks": "inf", "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1,
        "model_seed": 1,
    },
    "num_steps": 120,
    "batch_size": 13,
    "eval_batch_size": 17,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 20}, "state_every": 10},
    "logger_config": {"logging_steps": {"linear_space": 4}, "loss_every": 1},
}  # fmt: skip

DONE, STOPPED, TOLD = 0, 1, 3


def machine(bucket: str, root: str, lifetime_s: float) -> Any:
    """The store of one machine."""
    from icl.storage import LocalStore, MirroredStore, S3Store

    remote = S3Store(bucket, claim_lifetime_s=lifetime_s, listing_lifetime_s=0.0)
    return MirroredStore(LocalStore(root), remote, first_pause_s=0.05)


def write(environ: dict[str, str], bucket: str, root: str, lifetime_s: float, step_s: float) -> None:
    """Train the run; the exit status is one of the above, and the reason goes to a file beside the root."""
    os.environ |= environ  # the server of the forks is older than the test
    import torch

    from icl.config import TrainingConfig
    from icl.execution.surroundings import Surroundings
    from icl.execution.training_runs import run_training
    from icl.storage import claims
    from icl.storage.locks import RunInUseError
    from icl.training.optimizers import FlatOptimizer

    claims._place = lambda: root  # another machine cannot ask the system whether a process lives
    update = FlatOptimizer.update
    FlatOptimizer.update = lambda *arguments: (time.sleep(step_s), update(*arguments))[1]  # type: ignore[method-assign]
    sys.stderr = open(f"{root}.log", "a")  # noqa: SIM115
    place = Surroundings(machine(bucket, root, lifetime_s), Path(root) / "icl", torch.device("cpu"), tracking="local")
    try:
        outcome = run_training(TrainingConfig.parse(CONFIG), place)
    except RunInUseError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(TOLD)
    os._exit(DONE if outcome.finished else STOPPED)


class Machine:
    """One machine with a disk of its own, on which the run is started again and again."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bucket_writers", "torch", "icl.execution.training_runs", "boto3.s3.transfer"])

    def __init__(self, bucket: str, root: Path, lifetime_s: float, step_s: float) -> None:
        root.parent.mkdir(parents=True, exist_ok=True)
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self.arguments = (aws, bucket, str(root), lifetime_s, step_s)
        self.process: Any = None
        self.endings: list[int] = []

    def start(self) -> None:
        """Start the run."""
        self.process = self.context.Process(target=write, args=self.arguments)
        self.process.start()

    def running(self) -> bool:
        """Whether it runs; notes how it ended."""
        if self.process is not None and self.process.exitcode is not None:
            self.endings.append(self.process.exitcode)
            self.process = None
        return self.process is not None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the run."""
        if self.running():
            os.kill(self.process.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """How the run ended, if it did in time."""
        self.process.join(timeout_s)
        return None if self.running() else self.endings[-1]
