"""The estimates along one run, with their storage, lock, tracker and stop signals."""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from icl.checkpoints import Checkpoints
from icl.checkpoints.run import RECORDS
from icl.config import ConfigError
from icl.devices import devices_for_runs
from icl.estimation import LLCConfig, estimate_over_run
from icl.estimation.estimate import hessian_of
from icl.estimation.traces import TRACES, append_trace, read_estimates
from icl.execution.progress import progress_bar
from icl.execution.several_devices import OnePerDevice
from icl.execution.signals import stop_signal
from icl.execution.surroundings import Surroundings
from icl.sampling import LLCResult
from icl.storage import store_from_environment
from icl.storage.files import write_table
from icl.subjects import Subject
from icl.subjects.digest import DIGEST, first_changed, weights_digest
from icl.subjects.named import make_subject
from icl.subjects.regression import RegressionRun
from icl.tracking.trackers import IMAGES, failures_recorded

TABLES = "tables"


def subject_of(config: LLCConfig, place: Surroundings) -> Subject:
    """The subject of the estimates.

    Raises:
        ConfigError: the subject cannot be made.
        CheckpointError: the training run of this name was made with other settings.
    """
    if config.is_regression:
        return RegressionRun(config.training, place.checkpoints(config.training), config.grad_tasks, config.eval_tasks)
    return make_subject(config.subject, config.subject_config)


def subject_here(config: LLCConfig) -> Subject:
    """The subject in the surroundings that the environment describes."""
    return subject_of(config, Surroundings.from_environment())


def results_folder(config: LLCConfig, place: Surroundings) -> Checkpoints:
    """The folder of the estimates, with its lock and settings.

    Raises:
        CheckpointError: the estimates in it were made with other settings.
    """
    return Checkpoints(place.store, config.name, records=(*RECORDS, TRACES), beside=(TABLES, IMAGES)).expect(config)


def refuse_changed_weights(
    config: LLCConfig, subject: Subject, rows: Sequence[Mapping[str, Any]], steps: Collection[int]
) -> None:
    """Refuse estimates at these steps that were made at other weights than the subject has now.

    Raises:
        ConfigError: there is one. The message names the first.
    """
    changed = first_changed(subject, {row["step"]: row.get(DIGEST) for row in rows if row["step"] in steps})
    if changed is not None:
        raise ConfigError(
            f"the weights at step {changed} are not those that {config.name} holds the estimate of; delete these estimates with: icl runs "
            f"delete {config.name}, or keep the new weights in another folder with a sweep file of its own"
        )


def run_llc(config: LLCConfig, place: Surroundings) -> int:
    """Estimate along a subject's checkpoints, and continue where an earlier call stopped.

    Several GPUs share the checkpoints, one process each. These processes look for a training run in the store that the environment
    describes; a run in another store is estimated on one GPU.

    The results folder of `config.name` gets the estimates as rows of `metrics.jsonl`, the losses and distances of their
    chains in `traces.jsonl` (`icl.estimation.traces`), and the tables that the sampler's metrics ask for
    (`icl.estimation.record.tables_of`) as `tables/<name>-<step>.csv.gz`. With a bucket, each estimate is sent when it is recorded.

    Returns:
        How many checkpoints are left without an estimate.

    Raises:
        ConfigError: the subject cannot be made, or has no checkpoints; or it has other weights than when it was estimated.
        CheckpointError: the training run, or the estimates of this name, were made with other settings.
        RunInUseError: another process makes these estimates, or has taken them over.
    """
    # Imported here because it needs pandas, which training does not need.
    from icl.estimation.record import figures_of, table_names, tables_of

    config = config.of(place.with_kept_seed(config.training))
    subject = subject_of(config, place)
    name = config.name
    estimates = results_folder(config, place)
    with stop_signal(place.supervisor) as stopped, estimates.lock(place.lock_wait_s):
        # A wrong choice of checkpoints, and weights of another run, must raise before anything is recorded.
        present = subject.steps()
        chosen = config.chosen_steps(present)
        subject.model(chosen[0])
        if replaced := config.substitutes(present):
            each = ", ".join(f"{step} by {nearest}" for step, nearest in replaced.items())
            print(
                f"icl: {len(replaced)} steps have no checkpoint; the nearest is used instead: {each}", file=sys.stderr
            )
        folder = place.results / name
        rows = read_estimates(folder)

        def table_path(table_name: str, step: int) -> Path:
            return folder / TABLES / f"{table_name}-{step}.csv.gz"

        def is_whole(row: Mapping[str, Any]) -> bool:
            """Whether its tables are there, too. A machine that died may have sent the row alone."""
            names = table_names(config, row["chains/lost"] < config.sampler_config.num_chains)
            return all(table_path(table_name, row["step"]).exists() for table_name in names)

        done = [row["step"] for row in rows if is_whole(row)]
        refuse_changed_weights(config, subject, rows, set(chosen) & set(done))
        if already := len(set(chosen) & set(done)):
            print(f"icl: {name}: {already} of {len(chosen)} estimates exist and are not made again", file=sys.stderr)
        for remark in config.sampler_config.without_effect():
            print(f"icl: {name}: {remark}", file=sys.stderr)
        estimates.save_config(config.model_dump(mode="json"))
        # On an accelerator, several threads of chains would only wait for each other.
        cores = place.threads if place.device.type == "cpu" else 1
        config = config.model_copy(update={"sampler_config": config.sampler_config.model_copy(update={"cores": cores})})
        next_step = max(done, default=-1) + 1
        tracker = place.open_tracker(name, config, config.training.logger_config, next_step, job_type="llc")

        def record(step: int, model: nn.Module, result: LLCResult) -> None:
            estimates.confirm_lock()
            row = result.summary()
            if not config.is_regression:  # the weights of a regression run follow from its settings
                row[DIGEST] = weights_digest(subject.model(step))  # as it is read; a forward pass may add buffers
            if "hessian" in config.sampler_config.eval_metrics:
                row |= hessian_of(config, subject, step, model, place.device)
            if place.tracking != "none":
                # Written before the metrics, because a checkpoint counts as done once it has metrics.
                append_trace(folder, step, result)
                for table_name, table in tables_of(config, result).items():
                    write_table(table, table_path(table_name, step))
            if lost := int(result.llc_per_chain.isnan().sum()):
                tracker.alert(
                    "Chains diverged", f"{name}, step {step}: {lost} of {len(result.llc_per_chain)} chains diverged"
                )
            tracker.summary({"step": step, **row})
            tracker.log(step, row, figures_of(config, subject, step, model, result))
            written = [path for beside in (TABLES, IMAGES) for path in sorted((folder / beside).glob(f"*-{step}.*"))]
            estimates.send_records(path.relative_to(folder).as_posix() for path in written)

        workers = _workers(config, place)
        note = ""

        def tell(value: float, error: float) -> None:
            nonlocal note
            note = f"λ̂ so far {value:.3g} ± {error:.2g}"

        try:
            with failures_recorded(tracker), progress_bar(name) as update:
                left = estimate_over_run(
                    config, subject, done, record, place.device,
                    lambda now, total: update(now, note, total), stopped,
                    next((row["gamma"] for row in rows if "gamma" in row), None), tell, workers,
                )  # fmt: skip
            tracker.finish("interrupted" if left else "finished")
        finally:
            estimates.flush()
    return left


def _workers(config: LLCConfig, place: Surroundings) -> OnePerDevice | None:
    """One process per GPU; None if there is one GPU, or if `subject_here` would be another subject than that of `place`."""
    devices = devices_for_runs(place.device)
    if len(devices) < 2:
        return None
    here = not config.is_regression or str(place.store) == str(store_from_environment(os.environ))
    return OnePerDevice(devices, subject_here) if here else None
