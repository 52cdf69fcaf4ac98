"""The runs of a sweep file as processes on this machine. `icl.execution.ray` does the same on a Ray cluster.

Each process gets its own sweep file with its one run. So changes to the user's sweep file do not affect running
processes, and a failed run can be repeated by hand.
"""

import os
import sys
from collections.abc import Sequence

import torch
import yaml

from icl.config import ConfigError
from icl.devices import available_cores
from icl.execution.display import runs_display
from icl.execution.local import LocalProcess
from icl.execution.names import RunConfig, by_name
from icl.execution.output import OUTPUT
from icl.execution.run import Command, is_complete
from icl.execution.schedule import Launch, ScheduledRun, State, run_all
from icl.execution.signals import status_of_stop
from icl.execution.surroundings import SUPERVISOR, Surroundings
from icl.native.quota import THREADS
from icl.storage.files import write_atomically

POINT = "sweep.yaml"


def run_sweep(
    command: Command,
    configs: Sequence[RunConfig],
    place: Surroundings,
    jobs: int | None,
    executor: str,
) -> int:
    """Do what is missing of a sweep, with a live table and one at the end; returns the exit status.

    Args:
        command: "train" or "llc".
        configs: all points, in the file's order.
        place: the surroundings of every run.
        jobs: runs at a time; None: one per CPU core, or one on an accelerator.
        executor: "local" or "ray".

    Raises:
        ConfigError: the executor is unknown.
    """
    if executor not in ("local", "ray"):
        raise ConfigError(f"--executor must be local, batch (only with train) or ray (got {executor!r})")
    runs = scheduled_runs(configs, place)
    if executor == "ray":
        from icl.execution.ray import ray_cluster

        with ray_cluster(command, configs, place) as (launch_task, room):
            return _drive(runs, launch_task, jobs or room)
    jobs = jobs or available_cores(place.device)
    threads = max(available_cores(torch.device("cpu")) // min(jobs, len(runs)), 1)
    environment = {**os.environ, THREADS: _at_most(os.environ.get(THREADS), threads), SUPERVISOR: str(os.getpid())}

    def launch(run: ScheduledRun) -> LocalProcess:
        folder = place.results / run.name
        write_atomically(folder / POINT, _sweep_of_one(configs[run.index], place).encode())
        options = ["--jobs", str(threads), "--tracking", place.tracking]
        words = [sys.executable, "-m", "icl", command, str(folder / POINT), *options]
        return LocalProcess(words, folder / OUTPUT, environment)

    return _drive(runs, launch, jobs)


def scheduled_runs(configs: Sequence[RunConfig], place: Surroundings) -> list[ScheduledRun]:
    """The runs of a sweep. Complete runs are marked as skipped. Points that describe the same run appear once."""
    return [
        ScheduledRun(name, index, State.SKIPPED if is_complete(configs[index], place) else State.WAITING)
        for name, index in by_name(configs).items()
    ]


def _at_most(given: str | None, threads: int) -> str:
    """The user's number of threads, but no more than this process has for one run."""
    return str(min(int(given), threads)) if given and given.isdecimal() else given or str(threads)


def _sweep_of_one(config: RunConfig, place: Surroundings) -> str:
    """The text of a sweep file with this run only."""
    # Settings that the user left out stay out, because some may come from the data.
    given = config.model_dump(mode="json", exclude_unset=True)
    parameters = {key: {"value": value} for key, value in given.items()}
    kept = {"project": place.project, "entity": place.entity}
    return yaml.safe_dump({"method": "grid", **kept, "parameters": parameters}, sort_keys=False)


def _drive(runs: Sequence[ScheduledRun], launch: Launch, jobs: int) -> int:
    with runs_display(jobs) as show:
        return 0 if run_all(runs, launch, jobs, show) else status_of_stop()
