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
from icl.devices import available_cores, devices_for_runs, runs_at_once, seen_alone
from icl.execution.display import runs_display
from icl.execution.local import LocalProcess
from icl.execution.names import RunConfig, by_name, training_of
from icl.execution.output import OUTPUT
from icl.execution.run import Command, is_complete
from icl.execution.schedule import Launch, ScheduledRun, State, run_all
from icl.execution.signals import status_of_stop
from icl.execution.surroundings import SUPERVISOR, Surroundings
from icl.execution.training_runs import batches
from icl.native.quota import THREADS
from icl.storage.files import write_atomically

POINT = "sweep.yaml"

Share = tuple[torch.device, ...]
"""The devices of one process."""


def run_sweep(
    command: Command,
    configs: Sequence[RunConfig],
    place: Surroundings,
    jobs: int | None,
    executor: str,
    together: bool = False,
) -> int:
    """Do what is missing of a sweep, with a live table and one at the end; returns the exit status.

    If there are several accelerators, each process sees its share of them only: one, which it has to itself as long as there are no more
    jobs than accelerators. If fewer runs of `llc` are left than accelerators, a share is several, and the run's checkpoints are divided
    among them.

    Args:
        command: "train" or "llc".
        configs: all points, in the file's order.
        place: the surroundings of every run.
        jobs: runs at a time; None: one per CPU core, or one per accelerator.
        executor: "local" or "ray".
        together: whether training runs that differ only in their seeds share a process, which trains them as one batch.

    Raises:
        ConfigError: the executor is unknown.
    """
    if executor not in ("local", "ray"):
        raise ConfigError(f"--executor must be local, batch (only with train) or ray (got {executor!r})")
    if executor == "ray":
        from icl.execution.ray import ray_cluster

        with ray_cluster(command, configs, place) as (launch_task, room):
            return _drive(scheduled_runs([[config] for config in configs], place), launch_task, jobs or room)
    devices, jobs = devices_for_runs(place.device), jobs or runs_at_once(place.device)
    units = batches([training_of(config) for config in configs], jobs) if together else [[each] for each in configs]
    runs = scheduled_runs(units, place)
    at_once = max(min(jobs, sum(run.state is State.WAITING for run in runs)), 1)
    threads = max(available_cores(torch.device("cpu")) // at_once, 1)
    environment = {**os.environ, THREADS: _at_most(os.environ.get(THREADS), threads), SUPERVISOR: str(os.getpid())}

    shares = shared(devices, at_once if command == "llc" else len(devices))
    started: list[tuple[Share, LocalProcess]] = []

    def launch(run: ScheduledRun) -> LocalProcess:
        unit = units[run.index]
        folder = place.results / run.name.partition(" ")[0]
        write_atomically(folder / POINT, _sweep_of(unit, place).encode())
        options = ["--jobs", str(threads), "--tracking", place.tracking, *(["--executor", "batch"] if together else [])]
        words = [sys.executable, "-m", "icl", command, str(folder / POINT), *options]
        share = least_busy(shares, [share for share, process in started if process.poll() is None])
        own = seen_alone(share) if len(devices) > 1 else {}
        process = LocalProcess(words, folder / OUTPUT, environment | own)
        started.append((share, process))
        return process

    return _drive(runs, launch, jobs)


def scheduled_runs(units: Sequence[Sequence[RunConfig]], place: Surroundings) -> list[ScheduledRun]:
    """What each process does: usually one run. Complete ones are marked as skipped. Points that describe the same run appear once."""
    scheduled = []
    for name, index in by_name([unit[0] for unit in units]).items():
        complete = all(is_complete(config, place) for config in units[index])
        more = f" and {len(units[index]) - 1} more seeds" if len(units[index]) > 1 else ""
        scheduled.append(ScheduledRun(name + more, index, State.SKIPPED if complete else State.WAITING))
    return scheduled


def shared(devices: Sequence[torch.device], processes: int) -> list[Share]:
    """The devices, divided among at most as many processes."""
    count = max(1, min(processes, len(devices)))
    return [tuple(devices[index::count]) for index in range(count)]


def least_busy(shares: Sequence[Share], busy: Sequence[Share]) -> Share:
    """The first of the shares that the fewest processes have."""
    return min(shares, key=list(busy).count)


def _at_most(given: str | None, threads: int) -> str:
    """The user's number of threads, but no more than this process has for one run."""
    return str(min(int(given), threads)) if given and given.isdecimal() else given or str(threads)


def _sweep_of(configs: Sequence[RunConfig], place: Surroundings) -> str:
    """The text of a sweep file with these runs only. They may differ in one setting, such as `task_config`."""
    # Settings that the user left out stay out, because some may come from the data.
    given = [config.model_dump(mode="json", exclude_unset=True) for config in configs]
    parameters = {
        key: {"value": value}
        if all(each.get(key) == value for each in given)
        else {"values": [each[key] for each in given]}
        for key, value in given[0].items()
    }
    kept = {"project": place.project, "entity": place.entity}
    return yaml.safe_dump({"method": "grid", **kept, "parameters": parameters}, sort_keys=False)


def _drive(runs: Sequence[ScheduledRun], launch: Launch, jobs: int) -> int:
    with runs_display(jobs) as show:
        return 0 if run_all(runs, launch, jobs, show) else status_of_stop()
