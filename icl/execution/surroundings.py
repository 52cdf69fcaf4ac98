"""The surroundings of a run: its store, its results folder, its device and its tracker.

The commands, W&B agents and the offline executors all use them. So a run does not depend on who started it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from icl.checkpoints import Checkpoints
from icl.config import Training
from icl.config.settings import Settings
from icl.config.training import LoggerConfig
from icl.devices import resolve_device
from icl.storage import Store, local_root, store_from_environment
from icl.tracking import Tracker
from icl.tracking.opening import Wanted, open_tracker
from icl.tracking.wandb import Labels
from icl.training.kinds import sizes_of

Run = TypeVar("Run", bound=Training)

SUPERVISOR = "ICL_SUPERVISOR"
"""The environment variable in which an offline sweep gives its process number to its runs."""

# A process that has lost its supervisor needs at most this many seconds to save its state and free its run.
ORPHAN_S = 20.0


@dataclass(frozen=True)
class Surroundings:
    """Where a run is stored and computed.

    Attributes:
        store: the store of the checkpoints.
        results: the local folder that holds the results folders of all runs, named after them.
        device: the device to compute on.
        tracking: the argument `wanted` of `icl.tracking.opening.open_tracker`.
        project, entity: W&B project and entity, from the sweep file.
        threads: CPU threads of this process. Results do not depend on it.
        supervisor: number of the process that started this one and may start the run again elsewhere (a W&B agent, or the
            schedule of an offline sweep). When it is gone, the run saves its state and stops.
    """

    store: Store
    results: Path
    device: torch.device
    tracking: Wanted = "auto"
    project: str | None = None
    entity: str | None = None
    threads: int = 1
    supervisor: int | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, **overrides: Any) -> "Surroundings":
        """The surroundings that LOCAL_ROOT, AWS_BUCKET_NAME and DEVICE describe.

        Raises:
            ValueError: the device is unknown.
        """
        store = overrides.pop("store", None) or store_from_environment(environ)
        supervisor = environ.get(SUPERVISOR)
        if supervisor is not None and supervisor.isdecimal():
            overrides.setdefault("supervisor", int(supervisor))
        results = local_root(environ) / "icl"
        return cls(store, results, resolve_device(environ.get("DEVICE")), **overrides)

    def checkpoints(self, config: Training) -> Checkpoints:
        """The checkpoints of a training run.

        Raises:
            CheckpointError: a run of this name was made with other settings.
        """
        return Checkpoints(self.store, config.name, sizes_of(config)).expect(config)

    def with_kept_seed(self, config: Run) -> Run:
        """The settings; if a run has a name and a null model seed, with the seed that was drawn when the run began."""
        if config.run_name is None or config.task_config.seed is not None:
            return config
        return config.with_kept_seed(Checkpoints(self.store, config.run_name).settings())

    def open_tracker(
        self, name: str, config: Settings, logger: LoggerConfig, next_step: int, job_type: str = "train"
    ) -> Tracker:
        """The tracker of a run whose next step is `next_step`. The job type counts if the settings give none."""
        project = logger.project or self.project
        entity = logger.entity or self.entity
        data = config.model_dump(mode="json")
        labels = Labels(logger.group, logger.tags, logger.job_type or job_type, logger.alert)
        return open_tracker(
            self.results / name, name, data,
            next_step=next_step, wanted=self.tracking, project=project, entity=entity, labels=labels,
        )  # fmt: skip

    @property
    def lock_wait_s(self) -> float:
        """How long to wait for a run that is in use. Its holder may have lost its supervisor and be about to stop."""
        return 1.0 if self.supervisor is None else ORPHAN_S
