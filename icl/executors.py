"""The runs of a sweep file on this machine, as processes; `icl.ray_executor` runs the same grid on a Ray cluster.

Each process gets a sweep file of its own that holds its one run: what the user does to the sweep file meanwhile changes
nothing, and a run that failed can be repeated by hand.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import yaml

from icl.config import TrainingConfig
from icl.estimation import LLCConfig
from icl.grid import Ended, GridRun, Launch, State, run_all
from icl.grid_table import grid_display
from icl.jobs import SUPERVISOR, Surroundings, available_cores
from icl.settings import ConfigError
from icl.storage import StorageError
from icl.tracking import read_metrics
from icl.training import first_missing_step
from icl.wandb_tracking import RUN_ID

OUTPUT = "output.log"
POINT = "sweep.yaml"
DRAIN_S = 5.0  # for the last words of a process; one that it started itself may hold its output open for longer
_PROGRESS = re.compile(r": (\d+/\S+(?:, \d+ s left)?.*)")


class LocalProcess:
    """One run as a process in a group of its own, so that Ctrl-C reaches it from the schedule alone, and once."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        """Start the command; all it prints is appended to `log`.

        Raises:
            OSError: it cannot be started, or the log cannot be written.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._lines: deque[str] = deque(maxlen=50)
        self._ended_at: float | None = None
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._reader = threading.Thread(target=self._read, args=(os.dup(file.fileno()),), daemon=True)
        self._reader.start()

    def _read(self, log: int) -> None:
        assert self._process.stdout is not None
        with os.fdopen(log, "ab", buffering=0) as file, self._process.stdout as output:
            for line in output:
                with suppress(OSError):  # a full disk must not stop the reading, for then the process would block
                    file.write(line)
                if text := line.decode(errors="replace").strip():
                    self._lines.append(text)

    def poll(self) -> Ended | None:
        """How the process ended, or None; the reason is its last line."""
        status = self._process.poll()
        if status is None:
            return None
        self._ended_at = self._ended_at or time.monotonic()
        if self._reader.is_alive() and time.monotonic() - self._ended_at < DRAIN_S:
            return None
        if status == 0:
            return Ended(True)
        told = [line.removeprefix("icl: ") for line in self._lines if line.startswith("icl: ")]
        if status < 0 and not told:
            return Ended(False, f"ended by {signal.Signals(-status).name}")
        return Ended(False, [f"exit status {status}", *self._lines, *told][-1])

    def note(self) -> str:
        """Steps done and time left, as the process last said."""
        found = (_PROGRESS.search(line) for line in reversed(tuple(self._lines)))  # the reader may add to it meanwhile
        return next((match[1] for match in found if match), "")

    def stop(self) -> None:
        """SIGINT."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)


def run_grid(
    command: str,
    configs: Sequence[TrainingConfig],
    place: Surroundings,
    jobs: int | None,
    executor: str,
) -> int:
    """Run what is missing of a grid, with a live table and a closing one; returns the exit status.

    Args:
        configs: all points, in the file's order.
        jobs: runs at a time; by default one per CPU core, or one on an accelerator.
        executor: "local" or "ray".

    Raises:
        ConfigError: an unknown executor.
    """
    if executor not in ("local", "ray"):
        raise ConfigError(f"--executor must be local, batch (of train) or ray (got {executor!r})")
    runs = grid_runs(configs, place)
    if executor == "ray":
        from icl.ray_executor import ray_cluster

        with ray_cluster(command, configs, place) as (launch_task, room):
            return _drive(runs, launch_task, jobs or room)
    jobs = jobs or available_cores(place.device)
    threads = max(available_cores(torch.device("cpu")) // min(jobs, len(runs)), 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, SUPERVISOR: str(os.getpid())}

    def launch(run: GridRun) -> LocalProcess:
        folder = place.results / run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / POINT).write_text(_sweep_of_one(configs[run.index], place))
        options = ["--jobs", str(threads), "--tracking", place.tracking]
        words = [sys.executable, "-m", "icl", command, str(folder / POINT), *options]
        return LocalProcess(words, folder / OUTPUT, environment)

    return _drive(runs, launch, jobs)


def grid_runs(configs: Sequence[TrainingConfig], place: Surroundings) -> list[GridRun]:
    """The runs of a grid, those that need nothing more marked so; points that are one and the same run appear once."""
    runs: dict[str, GridRun] = {}
    for index, config in enumerate(configs):
        name = config.llc_name if isinstance(config, LLCConfig) else config.name
        if config.task_config.model_seed is None:
            name = f"{name}-{index}"  # each draws a seed, and with it a name, of its own
        if name not in runs:
            runs[name] = GridRun(name, index, State.SKIPPED if is_complete(config, place) else State.WAITING)
    return list(runs.values())


def is_complete(config: TrainingConfig, place: Surroundings) -> bool:
    """Whether running this configuration would do nothing."""
    if config.task_config.model_seed is None:
        return False
    config = config.resolved()
    checkpoints = place.checkpoints(config)
    name = config.llc_name if isinstance(config, LLCConfig) else config.name
    if place.tracking == "wandb" and not (place.results / name / RUN_ID).exists():
        return False  # what was recorded here alone is still to be sent
    try:
        if not isinstance(config, LLCConfig):
            finished = checkpoints.finished_step() is not None
            return finished and first_missing_step(config, checkpoints) == config.num_steps
        done = {row["step"] for row in read_metrics(place.results / name)}
        return bool(done) and set(config.chosen_steps(checkpoints.steps())) <= done
    except (ConfigError, StorageError):
        return False  # the run itself will say what is wrong


def _sweep_of_one(config: TrainingConfig, place: Surroundings) -> str:
    """The text of a sweep file whose only run is this one."""
    parameters = {key: {"value": value} for key, value in config.model_dump(mode="json").items()}
    kept = {"project": place.project, "entity": place.entity}
    return yaml.safe_dump({"method": "grid", **kept, "parameters": parameters}, sort_keys=False)


def _drive(runs: Sequence[GridRun], launch: Launch, jobs: int) -> int:
    with grid_display(jobs) as show:
        return 0 if run_all(runs, launch, jobs, show) else 1
