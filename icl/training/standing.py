"""Where a run stands, and how a call of `train` ended."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.checkpoints import Checkpoint, CheckpointError, Checkpoints
from icl.checkpoints.format import check_layout
from icl.config import Training, TrainingConfig
from icl.streams import Stream
from icl.training.kinds import num_parameters, sizes_of
from icl.training.optimizers import FlatOptimizer

_log = logging.getLogger(__name__)

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


def first_missing_step(config: Training, checkpoints: Checkpoints) -> int:
    """The number of updates from which `train` will continue: 0 for a new run, num_steps for a finished one."""
    return starting_point(config, checkpoints)[0]


def starting_point(config: Training, checkpoints: Checkpoints) -> tuple[int, dict[str, Tensor]]:
    """The newest stored state whose past is whole.

    A state whose past lacks checkpoints of the grid (a denser grid was asked for, or files were deleted) or rows of
    metrics that were there when it was saved is of no use: data are a function of the step, so running again from an
    earlier point gives the same weights and rows, and fills the gaps.

    Raises:
        CheckpointError: what is stored belongs to other settings, or is no state of such a run.
    """
    checkpoints.expect(config)
    present = set(checkpoints.steps())
    missing = min((step for step in config.checkpoint_steps() if step not in present), default=config.num_steps)
    start: tuple[int, dict[str, Tensor]] = 0, {}
    incomplete = 0
    for state in checkpoints.whole_states():
        _check_state(config, state, checkpoints.state_key(state.step))
        if state.step <= missing and checkpoints.has_metrics_of(state):
            start = state.step, dict(state.tensors)
            break
        incomplete = incomplete or (state.step if state.step <= missing else 0)
    if incomplete:
        _log.warning(
            "%s lacks rows of metrics before step %d and goes on from step %d, to write them again",
            config.name, incomplete, start[0],
        )  # fmt: skip
    return start


def _check_state(config: Training, state: Checkpoint, source: str) -> None:
    """Refuse a state with other tensors than such a run saves, before the optimiser takes them for its memory."""
    if state.metadata.get("config") is None:
        raise CheckpointError(f"{source} does not say with which settings it was made; delete it to go on without it")
    flat = torch.zeros(num_parameters(sizes_of(config)))
    own = {"flat": flat, **FlatOptimizer(config.optimizer_config, flat, fused=False).state(state.step)}
    check_layout(state.tensors, {name: tuple(value.shape) for name, value in own.items()}, source)
    if "step" in own and state.tensors["step"] != state.step:
        raise CheckpointError(
            f"{source} counts {float(state.tensors['step'])} updates; delete it to go on from an earlier one"
        )
