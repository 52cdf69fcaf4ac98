"""The training loop of one run: data -> gradient -> update, with checkpoints and metrics on their grids.

Checkpoint "t" is written after update number t, so it holds t + 1 updates, as in the reference code. Batch t is a
function of (sampling seed, t) alone and every state is saved whole, so that a run that was killed at any moment and
started again ends in the same bytes.

Shapes: B batch, K examples, P parameters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.devices import torch_threads
from icl.engine import Path, choose_path
from icl.evals import make_evaluator
from icl.model import flatten, initial_parameters, unflatten
from icl.optimizers import FlatOptimizer
from icl.streams import Stream
from icl.tracking import Tracker

Progress = Callable[[int, float], None]


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainingOutcome:
    """How a call of `train` ended.

    Attributes:
        name: of the run.
        steps_done: updates in the newest state.
        finished: whether every step is done.
        summary: the metrics of the last evaluation; empty if the run had been finished before.
    """

    name: str
    steps_done: int
    finished: bool
    summary: Mapping[str, float]


def data_stream(config: TrainingConfig) -> Stream:
    """The stream of training batches; seeds must be resolved."""
    seed = config.task_config.sampling_seed
    assert seed is not None, "seeds are resolved before use"
    return Stream(seed, "training")


def train(
    config: TrainingConfig,
    checkpoints: Checkpoints,
    tracker: Tracker,
    device: torch.device | str = "cpu",
    threads: int = 1,
    on_step: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome:
    """Train one run to its end, continuing from what its checkpoints hold.

    Args:
        config: with resolved seeds (`config.resolved()`).
        checkpoints: of this run; its lock must be held by the caller.
        tracker: receives the metrics, opened by the caller for the step that `first_missing_step` gives.
        device: where to compute.
        threads: CPU threads of a step; with the native kernel the result does not depend on it.
        on_step: called after each update with (updates done, loss).
        should_stop: asked before each step; True saves the state and returns.

    Raises:
        TrainingDiverged: the loss is not finite; checkpoints up to the last good step stay.
        CheckpointError: no stored state fits this run.
    """
    if torch.device(device).type != "cpu":
        from icl.ensemble_training import train_ensemble  # which is built on this module

        return train_ensemble([config], [checkpoints], [tracker], device, on_step, should_stop)[0]
    path = choose_path(config.task_config.shape, device, threads)
    with torch_threads(1 if path.name == "native" else threads):
        return _train_on_cpu(config, checkpoints, tracker, path, on_step, should_stop)


def _train_on_cpu(
    config: TrainingConfig,
    checkpoints: Checkpoints,
    tracker: Tracker,
    path: Path,
    on_step: Progress | None,
    should_stop: Callable[[], bool],
) -> TrainingOutcome:
    task = config.task_config
    shape, stream, law = task.shape, data_stream(config), task.pretrain_task()
    assert task.model_seed is not None, "seeds are resolved before use"
    step, tensors = starting_point(config, checkpoints)
    if step == config.num_steps and checkpoints.finished_step() is not None:
        return TrainingOutcome(config.name, step, True, {})

    flat = tensors.pop("flat") if tensors else flatten(initial_parameters(shape, task.model_seed))
    optimizer = FlatOptimizer(config.optimizer_config, flat)
    optimizer.restore(tensors)
    evaluate = make_evaluator(config, predict=path.predict)
    checkpoint_at, log_at = set(config.checkpoint_steps()), set(config.logging_steps())
    metadata = {"config": config.model_dump_json()}
    summary: Mapping[str, float] = {}

    def save_state() -> None:
        checkpoints.save_state(step, {"flat": flat.detach(), **optimizer.state()}, metadata)

    saved = step
    while step < config.num_steps and not should_stop():
        xs, ys = law.sample(stream, step, config.batch_size)
        token_losses, gradient = path.run(flat.detach(), xs, ys)
        loss = float(token_losses.mean())
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"{config.name}: the loss became {loss} at step {step}; the state after {saved} steps is kept. "
                f"Lower optimizer_config.lr (now {config.optimizer_config.lr})"
            )
        optimizer.update(gradient, config.learning_rate(step))
        if step in log_at:
            summary = evaluate(unflatten(shape, flat.detach()))
            tracker.log(step, {"batch/loss": loss, **summary})
        elif step % config.logger_config.loss_every == 0:
            tracker.log(step, {"batch/loss": loss})
        if step in checkpoint_at:
            checkpoints.save(step, unflatten(shape, flat.detach()), metadata)
        step += 1
        if step % config.checkpointer_config.state_every == 0 or step == config.num_steps:
            save_state()
            saved = step
        if on_step is not None:
            on_step(step, loss)
    if step != saved:
        save_state()
    if step == config.num_steps:
        checkpoints.keep_last_state()
        # A run that was killed between its last state and its end has its summary still to come.
        summary = summary or evaluate(unflatten(shape, flat.detach()))
    return TrainingOutcome(config.name, step, step == config.num_steps, summary)


def first_missing_step(config: TrainingConfig, checkpoints: Checkpoints) -> int:
    """The number of updates from which `train` will continue: 0 for a new run, num_steps for a finished one."""
    return starting_point(config, checkpoints)[0]


def starting_point(config: TrainingConfig, checkpoints: Checkpoints) -> tuple[int, dict[str, Tensor]]:
    """The newest stored state that comes before every missing checkpoint.

    A state whose past lacks checkpoints of the grid (a denser grid was asked for, or files were deleted) is of no use:
    data are a function of the step, so running again from an earlier point gives the same weights and fills the gaps.
    """
    present = set(checkpoints.steps())
    missing = min((step for step in config.checkpoint_steps() if step not in present), default=config.num_steps)
    state = checkpoints.newest_state()
    if state is None or state.step > missing:
        return 0, {}
    return state.step, dict(state.tensors)
