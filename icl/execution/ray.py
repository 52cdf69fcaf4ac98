"""The runs of a sweep file on an existing Ray cluster (extra `[ray]`), with the same schedule and table as on one machine.

Each run is a Ray task. If its worker dies, Ray starts the task again on another machine, and the run goes on from its last
saved state. So the machines must share their storage: a bucket, or a common folder as LOCAL_ROOT. `icl` must be installed on
all of them.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from icl.config import ConfigError
from icl.execution.names import RunConfig
from icl.execution.run import Command, parse_config, run_point
from icl.execution.schedule import Ended, Launch, ScheduledRun
from icl.execution.surroundings import Surroundings
from icl.native.allocator import keep_freed_memory
from icl.storage import local_root
from icl.tracking.opening import Wanted

# How often Ray restarts a run whose worker was lost.
RETRIES = 3
CONNECT_S = 10.0
_PASSED_ON = ("AWS_", "DEVICE", "LOCAL_ROOT", "OMP_NUM_THREADS", "WANDB_")


class RayTask:
    """One run as a Ray task."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray = ray
        self._reference = reference

    def poll(self) -> Ended | None:
        """How the task ended, or None."""
        ready, _ = self._ray.wait([self._reference], timeout=0)
        if not ready:
            return None
        try:
            return Ended(*self._ray.get(self._reference))
        except self._ray.exceptions.RayError as error:  # cancelled, or its workers were lost too often
            return Ended(False, (str(error).strip().splitlines() or [type(error).__name__])[0])

    def note(self) -> str:
        """An empty text. The progress of a task shows on W&B and in its files."""
        return ""

    def stop(self) -> None:
        """Interrupt the task, which then saves its state and returns."""
        self._ray.cancel(self._reference)

    def kill(self) -> None:
        """End the worker."""
        self._ray.cancel(self._reference, force=True)


@contextmanager
def ray_cluster(
    command: Command, configs: Sequence[RunConfig], place: Surroundings, environ: Mapping[str, str] = os.environ
) -> Iterator[tuple[Launch, int]]:
    """Connect to the cluster at RAY_ADDRESS (default: the one on this machine).

    Yields a function that starts a run there, and how many runs the cluster can run at a time.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--executor ray needs Ray: pip install 'icl[ray]'") from None
    address = environ.get("RAY_ADDRESS") or "auto"
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:  # tested first, because Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        ray.put(None)  # wrong packages on this machine show now, and not at the first run
    except ImportError as error:
        raise ConfigError(f"Ray does not work with the packages installed here: {error}") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"no Ray cluster at RAY_ADDRESS={address!r} ({reason}); start one with `ray start --head`"
        ) from None
    try:
        resources = {"num_gpus": 1} if place.device.type == "cuda" else {"num_cpus": 1}
        room = ray.cluster_resources().get("GPU" if "num_gpus" in resources else "CPU", 1)
        variables = {key: value for key, value in environ.items() if key.startswith(_PASSED_ON)}
        variables["LOCAL_ROOT"] = str(local_root(environ).absolute())
        folder = os.getcwd()
        remote = ray.remote(_run_on_worker).options(
            max_retries=RETRIES, runtime_env={"env_vars": variables}, **resources
        )

        def launch(run: ScheduledRun) -> RayTask:
            data = configs[run.index].model_dump(mode="json", exclude_unset=True)
            return RayTask(ray, remote.remote(command, data, folder, place.tracking, place.project, place.entity))

        yield launch, max(int(room), 1)
    finally:
        ray.shutdown()


def _run_on_worker(
    command: Command, data: dict[str, Any], folder: str, tracking: Wanted, project: str | None, entity: str | None
) -> tuple[bool, str]:
    """One run on a worker of the cluster: whether it is done, and if not, why in one line."""
    keep_freed_memory()
    if os.path.isdir(folder):  # a user's own subject and its files are found from there
        os.chdir(folder)
    place = Surroundings.from_environment(tracking=tracking, project=project, entity=entity)
    try:
        left = run_point(parse_config(command, data), replace(place, threads=1))
        return not left, left
    except (ValueError, RuntimeError, OSError) as error:
        return False, " ".join(str(error).split())
