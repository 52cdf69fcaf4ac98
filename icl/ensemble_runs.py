"""Runs of a sweep that differ in their seeds alone, trained as one batch in this process; each keeps its own lock,
tracker, checkpoints and resume, in the files of a run of its own."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.ensemble_training import seeds_left_out, train_ensemble
from icl.jobs import Surroundings, failures_recorded, stop_signal
from icl.progress import progress_bar
from icl.tracking import Tracker
from icl.training import TrainingOutcome, first_missing_step
from icl.wandb_tracking import wandb_is_set_up


def batches_runs(place: Surroundings) -> bool:
    """Whether runs are trained as one batch where nobody says otherwise: on an accelerator, unless W&B is to record
    them, whose client keeps one run at a time."""
    to_wandb = place.tracking == "wandb" or (place.tracking == "auto" and wandb_is_set_up())
    return place.device.type != "cpu" and not to_wandb


def train_in_batches(configs: Sequence[TrainingConfig], place: Surroundings) -> bool:
    """Train all runs, those that differ in their seeds alone together; True if every one is finished.

    A group that was stopped is the last: none after it is begun.
    """
    groups: dict[str, list[TrainingConfig]] = {}
    for config in {config.name: config for config in (each.resolved() for each in configs)}.values():
        groups.setdefault(seeds_left_out(config), []).append(config)
    return all(train_together(group, place) for group in groups.values())


def train_together(configs: Sequence[TrainingConfig], place: Surroundings) -> bool:
    """Train runs as one batch to their end, or to the next stop signal; True if every one is finished.

    Raises:
        RunInUseError: another process trains one of them.
        TrainingDiverged, CheckpointError, StorageError: see there.
    """
    with ExitStack() as stack:
        stopped = stack.enter_context(stop_signal(place.supervisor))
        unfinished: list[tuple[TrainingConfig, Checkpoints, Tracker]] = []
        for config in configs:
            checkpoints = place.checkpoints(config)
            stack.enter_context(checkpoints.lock(place.lock_wait_s))
            stack.callback(checkpoints.flush)
            start = first_missing_step(config, checkpoints)
            if start == config.num_steps and checkpoints.finished_step() is not None:
                continue
            checkpoints.save_config(config.model_dump(mode="json"))
            tracker = place.open_tracker(config.name, config, start)
            unfinished.append((config, checkpoints, tracker))
        if not unfinished:
            return True
        outcomes = _train(unfinished, place, stopped)
        for (config, checkpoints, tracker), outcome in zip(unfinished, outcomes, strict=True):
            tracker.summary(outcome.summary)
            tracker.finish("finished" if outcome.finished else "interrupted")
            if outcome.finished:
                checkpoints.mark_finished(config.num_steps - 1)
        return all(outcome.finished for outcome in outcomes)


def _train(
    runs: Sequence[tuple[TrainingConfig, Checkpoints, Tracker]], place: Surroundings, stopped: Callable[[], bool]
) -> list[TrainingOutcome]:
    configs, checkpoints, trackers = zip(*runs, strict=True)
    title = configs[0].name if len(configs) == 1 else f"{configs[0].name} and {len(configs) - 1} more seeds"
    with ExitStack() as recorded:
        for tracker in trackers:
            recorded.enter_context(failures_recorded(tracker))
        update = recorded.enter_context(progress_bar(title, configs[0].num_steps))
        return train_ensemble(
            configs,
            checkpoints,
            trackers,
            place.device,
            on_step=lambda step, loss: update(step, f"loss {loss:.4f}"),
            should_stop=stopped,
        )
