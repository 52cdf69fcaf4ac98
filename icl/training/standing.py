"""From which stored state a run continues, and how a call of `train` ended."""

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
        name: the run's name.
        steps_done: number of updates in the newest state.
        finished: whether all steps are done.
        summary: the metrics of the last evaluation; empty if the run was finished before.
    """

    name: str
    steps_done: int
    finished: bool
    summary: Mapping[str, float]


def data_stream(config: TrainingConfig) -> Stream:
    """The random stream of the training batches. Seeds must be resolved."""
    seed = config.task_config.sampling_seed
    assert seed is not None, "seeds are resolved before use"
    return Stream(seed, "training")


def first_missing_step(config: Training, checkpoints: Checkpoints) -> int:
    """The number of updates from which `train` will continue: 0 for a new run, num_steps for a finished one."""
    return starting_point(config, checkpoints)[0]


def starting_point(config: Training, checkpoints: Checkpoints) -> tuple[int, dict[str, Tensor]]:
    """The newest stored state before which nothing is missing: the updates it holds, and its tensors.

    A state is skipped if a checkpoint of the grid before it is missing (a denser grid was asked for, or files were
    deleted), or if rows of metrics are missing that were there when it was saved. Training then starts from an earlier
    state. Data are a function of the step, so it gives the same weights and rows, and fills the gaps.

    Raises:
        CheckpointError: a state belongs to other settings, or is not a state of such a run.
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
            "%s lacks rows of metrics before step %d; it continues from step %d to write them again",
            config.name, incomplete, start[0],
        )  # fmt: skip
    return start


def _check_state(config: Training, state: Checkpoint, source: str) -> None:
    """Refuse a state whose tensors differ from those that such a run saves.

    Raises:
        CheckpointError: the state names no settings, has other tensors, or counts other updates than its name says.
    """
    if state.metadata.get("config") is None:
        raise CheckpointError(f"{source} holds no settings; delete it, and the run continues from an earlier state")
    flat = torch.zeros(num_parameters(sizes_of(config)))
    own = {"flat": flat, **FlatOptimizer(config.optimizer_config, flat, fused=False).state(state.step)}
    check_layout(state.tensors, {name: tuple(value.shape) for name, value in own.items()}, source)
    if "step" in own and state.tensors["step"] != state.step:
        raise CheckpointError(
            f"{source} counts {float(state.tensors['step'])} updates, unlike its name; delete it, and the run continues "
            "from an earlier state"
        )
