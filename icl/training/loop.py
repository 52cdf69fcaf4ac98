"""The training loop: data -> gradient -> update, with checkpoints and metrics on their grids.

One loop trains one run, or several runs that differ only in their seeds (the members). A stepper (`icl.training.stepper`)
does the steps. There are three:

- `icl.training.cpu` trains one regression model on a CPU, step by step.
- `icl.training.accelerator` trains several regression models at once, in blocks of steps that the host only launches.
- `icl.training.language` trains language models.

A regression run that one stepper began may continue with the other.

Checkpoint "t" is written after update number t. So it holds t + 1 updates, as in the reference code. Batch t depends only on
(sampling seed, t), and every state is saved whole. So a run that was killed at any moment and started again ends in the same
bytes. If it continues with another engine, its last digits may differ, and a warning says so (`icl.training.engines`).

Shapes: E members, P parameters.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.checkpoints import Checkpoints
from icl.checkpoints.run import ROWS
from icl.config import Training, TrainingConfig
from icl.config.language import LanguageTraining
from icl.devices import torch_threads
from icl.engine import choose_path
from icl.subjects.tokens import TokenRows
from icl.tracking import Tracker
from icl.training.accelerator import AcceleratorStepper
from icl.training.cpu import CpuStepper
from icl.training.engines import ENGINES, engines_with
from icl.training.language import LanguageStepper
from icl.training.standing import Progress, TrainingDiverged, TrainingOutcome, starting_point
from icl.training.stepper import Stepper

_SEEDS = {"model_seed", "pretrain_seed", "true_seed", "sampling_seed"}


@dataclass(frozen=True)
class Member:
    """One run of a batch.

    Attributes:
        config: its settings, with resolved seeds (`config.resolved()`).
        checkpoints: its checkpoints. The caller holds their lock.
        tracker: receives its metrics. The caller opened it for the step that `first_missing_step` gives.
    """

    config: Training
    checkpoints: Checkpoints
    tracker: Tracker


def train(
    config: Training,
    checkpoints: Checkpoints,
    tracker: Tracker,
    device: torch.device | str = "cpu",
    threads: int = 1,
    on_step: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome:
    """`train_members` for a single run."""
    return train_members([Member(config, checkpoints, tracker)], device, threads, on_step, should_stop)[0]


def train_members(
    members: Sequence[Member],
    device: torch.device | str = "cpu",
    threads: int = 1,
    on_step: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    rows: TokenRows | None = None,
) -> list[TrainingOutcome]:
    """Train runs that differ only in their seeds to their end. Each run continues from its newest usable state.

    Members at different steps are trained in groups of equal step, one group after the other. Resuming is exact to
    the bit as long as the groups stay the same.

    Args:
        members: the runs.
        device: the device to compute on.
        threads: CPU threads of a step. With the native kernel the result does not depend on it.
        on_step: called after each block of steps with (updates done, mean loss).
        should_stop: asked before each block. If it returns True, the states are saved and the function returns.
        rows: the tokens of language runs, if they have been read already (`icl.training.language.rows_of_task`).

    Raises:
        ValueError: members differ in more than their seeds.
        TrainingDiverged: the loss of a member is not finite. Checkpoints up to the last good block stay.
        CheckpointError: a stored state belongs to other settings or is not a state of such a run.
    """
    if len({seeds_left_out(member.config) for member in members}) > 1:
        raise ValueError("runs trained as one batch must differ only in their seeds; train the others separately")
    starts = [starting_point(member.config, member.checkpoints) for member in members]
    groups: dict[int, list[int]] = defaultdict(list)
    for index, (step, _) in enumerate(starts):
        groups[step].append(index)
    outcomes: dict[int, TrainingOutcome] = {}
    for step, chosen in sorted(groups.items()):
        group, states = [members[i] for i in chosen], [starts[i][1] for i in chosen]
        if all(_is_finished(member, step) for member in group):
            results = [TrainingOutcome(member.config.name, step, True, {}) for member in group]
        else:
            with stepper_for(
                [member.config for member in group], step, states, torch.device(device), threads, rows
            ) as stepper:
                results = _train_group(group, stepper, on_step, should_stop)
        outcomes |= dict(zip(chosen, results, strict=True))
    return [outcomes[index] for index in range(len(members))]


def seeds_left_out(config: Training) -> str:
    """All settings that runs of one batch must share, as text."""
    rest = config.model_dump_json(exclude={"task_config", "run_name"})
    return rest + config.task_config.model_dump_json(exclude=_SEEDS)


def _is_finished(member: Member, step: int) -> bool:
    return step == member.config.num_steps and member.checkpoints.finished_step() is not None


@contextmanager
def stepper_for(
    configs: Sequence[Training],
    step: int,
    states: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    threads: int,
    rows: TokenRows | None = None,
) -> Iterator[Stepper]:
    """The fastest stepper for these runs on this device."""
    if language := [config for config in configs if isinstance(config, LanguageTraining)]:
        with torch_threads(threads):
            yield LanguageStepper(language, step, states, device, rows)
        return
    regression = [config for config in configs if isinstance(config, TrainingConfig)]
    if device.type != "cpu" or len(configs) > 1:
        yield AcceleratorStepper(regression, step, states, device)
        return
    config = regression[0]
    path = choose_path(config.task_config.shape, device, threads, precision=config.matmul_precision)
    with torch_threads(1 if path.name == "native" else threads):
        yield CpuStepper(config, step, states[0], path)


def _train_group(
    members: Sequence[Member], stepper: Stepper, on_step: Progress | None, should_stop: Callable[[], bool]
) -> list[TrainingOutcome]:
    """Train members that are at the same step."""
    config = members[0].config
    last_step, state_every = config.num_steps, config.checkpointer_config.state_every
    metadata = [{"config": member.config.model_dump_json()} for member in members]
    vouching = [member.checkpoints.keeps_metrics() for member in members]
    engines = [{ENGINES: engines_with(stepper.engine, stepper.step, member.checkpoints)} for member in members]
    checkpoint_at, log_at = set(config.checkpoint_steps()), set(config.logging_steps())
    due = sorted(checkpoint_at | log_at)

    def end_of_block(step: int) -> int:
        """The step at which the next checkpoint, evaluation or saved state is due, or at which the block is full."""
        next_due = due[min(bisect_left(due, step), len(due) - 1)] + 1
        return min(next_due, (step // state_every + 1) * state_every, step + stepper.block, last_step)

    def save_states() -> None:
        for member, state, about, counts, by in zip(
            members, stepper.states(), metadata, vouching, engines, strict=True
        ):
            rows = {ROWS: member.tracker.rows} if counts else {}
            member.checkpoints.save_state(stepper.step, state, about | rows | by)

    summaries: list[Mapping[str, float]] = [{} for _ in members]
    saved = stepper.step
    while stepper.step < last_step and not should_stop():
        first = stepper.step
        losses = stepper.run(end_of_block(first) - first)
        _check_finite(losses, members, first, saved)
        step = stepper.step
        evaluated = step - 1 in log_at
        if evaluated:
            summaries = stepper.evaluate()
        _log(members, losses, first, summaries if evaluated else None)
        if step - 1 in checkpoint_at:
            for member, weights, about in zip(members, stepper.weights(), metadata, strict=True):
                member.checkpoints.save(step - 1, weights, about)
        if step % state_every == 0 or step == last_step:
            save_states()
            saved = step
        if on_step is not None:
            on_step(step, float(losses[-1].mean()))
    if stepper.step != saved:
        save_states()
    finished = stepper.step == last_step
    if finished:
        for member in members:
            member.checkpoints.keep_last_state()
        # A run that was killed between its last state and its end has no summary yet.
        summaries = summaries if all(summaries) else stepper.evaluate()
    return [
        TrainingOutcome(member.config.name, stepper.step, finished, summary)
        for member, summary in zip(members, summaries, strict=True)
    ]


def _check_finite(losses: Tensor, members: Sequence[Member], first: int, saved: int) -> None:
    """Raise TrainingDiverged if one of the losses (S, E) of the steps from `first` on is not finite."""
    if losses.isfinite().all():
        return
    row, index = (~losses.isfinite()).nonzero()[0].tolist()
    config = members[index].config
    raise TrainingDiverged(
        f"{config.name}: the loss became {float(losses[row, index])} at step {first + row}; the state after {saved} "
        f"steps is kept. Lower optimizer_config.lr (now {config.optimizer_config.lr})"
    )


def _log(members: Sequence[Member], losses: Tensor, first: int, metrics: Sequence[Mapping[str, float]] | None) -> None:
    """Log the losses (S, E) on their grid, and the metrics, if any, at the last step of the block."""
    every, last = members[0].config.logger_config.loss_every, first + len(losses) - 1
    for index, member in enumerate(members):
        for step in range(first + -first % every, last + 1, every):
            if step < last or metrics is None:
                member.tracker.log(step, {"batch/loss": float(losses[step - first, index])})
        if metrics is not None:
            member.tracker.log(last, {"batch/loss": float(losses[-1, index]), **metrics[index]})
