"""One run of a sweep with everything it touches: storage, lock, tracker, device, signals.

The commands, W&B agents and the offline executors all end here, so that a run is the same run whoever started it.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.devices import resolve_device
from icl.estimation import LLCConfig, estimate_over_run, hessian_at_checkpoint
from icl.model import parameter_layout
from icl.progress import progress_bar
from icl.sampling import LLCResult
from icl.storage import DEFAULT_ROOT, Store, store_from_environment
from icl.traces import append_trace
from icl.tracking import Tracker, read_metrics
from icl.training import TrainingOutcome, first_missing_step, train
from icl.wandb_tracking import Wanted, agent_run, open_tracker

SUPERVISOR = "ICL_SUPERVISOR"
"""The environment variable by which an offline sweep tells its runs the number of its process."""

# A process that has lost its supervisor needs this long, at most, to save its state and free its run.
ORPHAN_S = 20.0


@dataclass(frozen=True)
class Surroundings:
    """Where a run lives and computes.

    Attributes:
        store: of the checkpoints.
        results: local folder of metrics; one folder per run name below it.
        device: where to compute.
        tracking: see `icl.wandb_tracking.open_tracker`.
        project, entity: of the sweep file, for W&B.
        threads: CPU threads of this process; results do not depend on it.
        supervisor: the process that started this one and may start the run again elsewhere (a W&B agent, the schedule
            of an offline sweep); when it is gone, the run saves its state and stops.
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
        """As LOCAL_ROOT, AWS_BUCKET_NAME and DEVICE say.

        Raises:
            ValueError: an unknown device.
        """
        store = overrides.pop("store", None) or store_from_environment(environ)
        supervisor = environ.get(SUPERVISOR)
        if supervisor is not None:
            overrides.setdefault("supervisor", int(supervisor))
        results = Path(environ.get("LOCAL_ROOT") or DEFAULT_ROOT) / "icl"
        return cls(store, results, resolve_device(environ.get("DEVICE")), **overrides)

    def checkpoints(self, config: TrainingConfig) -> Checkpoints:
        """The checkpoints of a training run."""
        layout = {name: size for name, (_, size) in parameter_layout(config.task_config.shape).items()}
        return Checkpoints(self.store, config.name, layout)

    def open_tracker(self, name: str, config: TrainingConfig, next_step: int) -> Tracker:
        """The tracker of a run that is about to do step `next_step`."""
        project = config.logger_config.project or self.project
        entity = config.logger_config.entity or self.entity
        data = config.model_dump(mode="json")
        return open_tracker(
            self.results / name, name, data, next_step=next_step, wanted=self.tracking, project=project, entity=entity
        )

    @property
    def lock_wait_s(self) -> float:
        """How long to wait for a run that is in use: its holder may have lost its supervisor and be about to stop."""
        return 1.0 if self.supervisor is None else ORPHAN_S


def run_training(config: TrainingConfig, place: Surroundings) -> TrainingOutcome:
    """Train a run to its end, or to the next stop signal, with its lock held.

    Raises:
        RunInUseError: another process trains this run.
        TrainingDiverged, CheckpointError, StorageError: see there.
    """
    config = config.resolved()
    checkpoints = place.checkpoints(config)
    with checkpoints.lock(place.lock_wait_s), stop_signal(place.supervisor) as stopped:
        start = first_missing_step(config, checkpoints)
        if start == config.num_steps and checkpoints.finished_step() is not None:
            checkpoints.keep_last_state()  # what an earlier process could not drop, or not send
            checkpoints.flush()
            if agent_run() is not None or place.tracking == "wandb":
                place.open_tracker(config.name, config, start).finish()  # W&B shows what was trained before
            return TrainingOutcome(config.name, start, True, {})
        checkpoints.save_config(config.model_dump(mode="json"))
        tracker = place.open_tracker(config.name, config, start)
        try:
            with failures_recorded(tracker):
                with progress_bar(config.name, config.num_steps) as update:
                    outcome = train(
                        config,
                        checkpoints,
                        tracker,
                        place.device,
                        threads=place.threads,
                        on_step=lambda step, loss: update(step, f"loss {loss:.4f}"),
                        should_stop=stopped,
                    )
                tracker.summary(outcome.summary)
            tracker.finish("finished" if outcome.finished else "interrupted")
            if outcome.finished:
                checkpoints.mark_finished(config.num_steps - 1)
        finally:
            checkpoints.flush()
        return outcome


def run_llc(config: LLCConfig, place: Surroundings) -> int:
    """Estimate along a run, continuing where an earlier call stopped; returns how many checkpoints are left undone.

    The estimates are rows of `metrics.jsonl` in the results folder of `config.llc_name`, the course of their chains is in
    `traces.jsonl` there (`icl.traces`), and the tables that the sampler's metrics ask for (`icl.llc_record.tables_of`) are
    `tables/<name>-<step>.csv.gz`.

    Raises:
        ConfigError: the training run has no checkpoints.
        RunInUseError: another process makes these estimates.
    """
    from icl.llc_record import figures_of, tables_of, write_table  # and with it pandas, which training does without

    checkpoints = place.checkpoints(config)
    name = config.llc_name
    estimates = Checkpoints(place.store, name)
    with estimates.lock(place.lock_wait_s), stop_signal(place.supervisor) as stopped:
        config.chosen_steps(checkpoints.steps())  # what cannot be met is an error before anything is recorded
        done = [row["step"] for row in read_metrics(place.results / name)]
        estimates.save_config(config.model_dump(mode="json"))
        # Beside an accelerator several threads of chains would only wait for each other.
        cores = place.threads if place.device.type == "cpu" else 1
        config = config.model_copy(update={"sampler_config": config.sampler_config.model_copy(update={"cores": cores})})
        tracker = place.open_tracker(name, config, max(done, default=-1) + 1)

        def record(step: int, weights: Mapping[str, Tensor], result: LLCResult) -> None:
            row = result.summary()
            if "hessian" in config.sampler_config.eval_metrics:
                row |= hessian_at_checkpoint(config, weights, place.device)
            if place.tracking != "none":
                # Before the metrics: a checkpoint counts as done once it has those.
                append_trace(place.results / name, step, result)
                for table_name, table in tables_of(config, result).items():
                    write_table(table, place.results / name / "tables" / f"{table_name}-{step}.csv.gz")
            tracker.summary({"step": step, **row})
            tracker.log(step, row, figures_of(config, result, weights))

        try:
            with failures_recorded(tracker), progress_bar(name) as update:
                left = estimate_over_run(
                    config, checkpoints, done, record, place.device,
                    lambda now, total: update(now, total=total), stopped,
                )  # fmt: skip
            tracker.finish("interrupted" if left else "finished")
        finally:
            estimates.flush()
    return left


def available_cores(device: torch.device) -> int:
    """CPU cores that this process may use for computing on the device."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return cores if device.type == "cpu" else 1


@contextmanager
def failures_recorded(tracker: Tracker) -> Iterator[None]:
    """Closes the record of work that fails, with the reason in it."""
    try:
        yield
    except KeyboardInterrupt:
        tracker.finish("interrupted")
        raise
    except BaseException as error:
        tracker.finish("failed", " ".join(str(error).split()) or type(error).__name__)
        raise


@contextmanager
def stop_signal(supervisor: int | None = None) -> Iterator[Callable[[], bool]]:
    """Yields whether the work should stop: SIGINT or SIGTERM came, or the supervisor is no longer this process's parent.

    A second signal interrupts at once.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked or supervisor not in (None, os.getppid())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
