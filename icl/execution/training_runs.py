"""Training runs with their storage, locks, trackers and stop signals.

A single run and a batch of runs that differ only in their seeds are handled by the same code. Each run has its own lock,
tracker and checkpoints, and resumes on its own.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from icl.config import Training
from icl.config.language import LanguageTraining
from icl.execution.health import loss_name, remark
from icl.execution.names import by_name
from icl.execution.progress import progress_bar
from icl.execution.seeds import show_over_seeds
from icl.execution.signals import stop_signal
from icl.execution.surroundings import Surroundings
from icl.subjects.tokens import TokenRows
from icl.tracking import read_metrics
from icl.tracking.agent import agent_run
from icl.tracking.trackers import failures_recorded
from icl.tracking.wandb import wandb_is_set_up
from icl.training import Member, TrainingDiverged, TrainingOutcome, first_missing_step, train_members
from icl.training.language import rows_of_task
from icl.training.loop import seeds_left_out


def run_training(config: Training, place: Surroundings) -> TrainingOutcome:
    """`train_together` for a single run."""
    return train_together([config], place)[0]


def train_together(configs: Sequence[Training], place: Surroundings) -> list[TrainingOutcome]:
    """Train runs as one batch to their end, or to the next stop signal, with their locks held.

    Raises:
        RunInUseError: another process trains one of them.
        CheckpointError: a run of this name was made with other settings. Nothing is written.
        ConfigError: the tokens of a language run are not there or do not fit. Nothing is written.
        TrainingDiverged, CheckpointError, StorageError: see `icl.training.train_members`.
    """
    configs = [place.with_kept_seed(config).resolved() for config in configs]
    outcomes: dict[str, TrainingOutcome] = {}
    members: list[Member] = []
    rows: TokenRows | None = None
    with ExitStack() as stack:
        stopped = stack.enter_context(stop_signal(place.supervisor))
        for config in configs:
            checkpoints = place.checkpoints(config)
            stack.enter_context(checkpoints.lock(place.lock_wait_s))
            stack.callback(checkpoints.flush)
            start = first_missing_step(config, checkpoints)
            if start == config.num_steps and checkpoints.finished_step() is not None:
                checkpoints.keep_last_state()  # an earlier process may have ended before it dropped the others
                checkpoints.restore_config(config.model_dump(mode="json"))
                if agent_run() is not None or place.tracking == "wandb":
                    place.open_tracker(
                        config.name, config, config.logger_config, start
                    ).finish()  # W&B shows what was trained before
                outcomes[config.name] = TrainingOutcome(config.name, start, True, {})
                continue
            if rows is None and isinstance(config, LanguageTraining):
                # Before the run is recorded, so that tokens that are refused begin no run.
                rows = rows_of_task(config.task_config)
            checkpoints.save_config(config.model_dump(mode="json"))
            tracker = place.open_tracker(config.name, config, config.logger_config, start)
            members.append(Member(config, checkpoints, tracker))
        if members:
            outcomes |= {outcome.name: outcome for outcome in _train(members, place, stopped, rows)}
    return [outcomes[config.name] for config in configs]


def batches(configs: Sequence[Training], parts: int = 1) -> list[list[Training]]:
    """Runs that differ only in their seeds together. If that gives fewer groups than `parts`, groups are divided."""
    groups: dict[str, list[Training]] = {}
    for index in by_name(configs).values():
        groups.setdefault(seeds_left_out(configs[index]), []).append(configs[index])
    each = -(-parts // len(groups))
    return [part for group in groups.values() for start in range(each) if (part := group[start::each])]


def train_in_batches(configs: Sequence[Training], place: Surroundings) -> bool:
    """Train all runs, in groups that differ only in their seeds; True if all are finished.

    If a group is stopped, no further group is started.
    """
    groups = batches([place.with_kept_seed(config).resolved() for config in configs])
    return all(all(outcome.finished for outcome in train_together(group, place)) for group in groups)


def batches_runs(place: Surroundings) -> bool:
    """Whether runs are trained as one batch by default: on an accelerator, unless W&B records them.

    W&B's client records only one run at a time.
    """
    to_wandb = place.tracking == "wandb" or (place.tracking == "auto" and wandb_is_set_up())
    return place.device.type != "cpu" and not to_wandb


def _train(
    members: Sequence[Member], place: Surroundings, stopped: Callable[[], bool], rows: TokenRows | None
) -> list[TrainingOutcome]:
    """Train the members, and close each one's record with its status."""
    config = members[0].config
    title = config.name if len(members) == 1 else f"{config.name} and {len(members) - 1} more seeds"
    with ExitStack() as recorded:
        for member in members:
            recorded.enter_context(failures_recorded(member.tracker, (TrainingDiverged,)))
        with progress_bar(title, config.num_steps) as update:
            outcomes = train_members(
                members,
                place.device,
                place.threads,
                on_step=lambda step, loss: update(step, f"loss {loss:.4f}"),
                should_stop=stopped,
                rows=rows,
            )
        for member, outcome in zip(members, outcomes, strict=True):
            loss = loss_name(member.config)
            first = next((row[loss] for row in read_metrics(place.results / outcome.name) if loss in row), None)
            text = remark(member.config, first, outcome.summary.get(loss)) if outcome.finished else ""
            member.tracker.summary({**outcome.summary, **({"remark": text} if text else {})})
            if outcome.finished and member.config.logger_config.seed_table:
                show_over_seeds(member, outcome.summary, place)
    for member, outcome in zip(members, outcomes, strict=True):
        member.tracker.finish("finished" if outcome.finished else "interrupted")
        if outcome.finished:
            member.checkpoints.mark_finished(member.config.num_steps - 1)
    return outcomes
