"""Where a run stands, and how a call of `train` ended."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.model import flatten, initial_parameters
from icl.streams import Stream

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


def initial_flat(config: TrainingConfig, state: Mapping[str, Tensor]) -> Tensor:
    """The parameters (P,) of a saved state, or those of a run that has not begun."""
    seed = config.task_config.model_seed
    assert seed is not None, "seeds are resolved before use"
    return state["flat"] if state else flatten(initial_parameters(config.task_config.shape, seed))


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
