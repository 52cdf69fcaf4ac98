"""One run of a sweep, training or estimates: its name, whether it is done, and doing it."""

from collections.abc import Mapping
from typing import Any, Literal

from icl.checkpoints import CheckpointError
from icl.config import ConfigError, TrainingConfig
from icl.config.kinds import parse_training
from icl.estimation import LLCConfig
from icl.estimation.traces import read_estimates
from icl.execution.llc_run import estimates_of, run_llc, subject_of
from icl.execution.names import RunConfig, training_of
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import StorageError
from icl.tracking.wandb import RUN_ID
from icl.training import first_missing_step

Command = Literal["train", "llc"]
CONFIGS: Mapping[Command, type[RunConfig]] = {"train": TrainingConfig, "llc": LLCConfig}
"""The settings that the sweep file of a command holds."""


def parse_config(command: Command, data: Mapping[str, Any]) -> RunConfig:
    """The settings of one point of a command's sweep, whatever kind of run it is.

    Raises:
        ConfigError: see `Settings.parse`.
    """
    return parse_training(data) if command == "train" else CONFIGS[command].parse(data)


def run_point(config: RunConfig, place: Surroundings) -> str:
    """Do what is missing of a run; returns what is left to do in one line, or nothing if it is done.

    Raises:
        ConfigError, RunInUseError, CheckpointError, StorageError, TrainingDiverged: see `run_training` and `run_llc`.
    """
    if isinstance(config, LLCConfig):
        left = run_llc(config, place)
        return f"{config.name} stopped with {left} checkpoints left" if left else ""
    outcome = run_training(config, place)
    done = f"{outcome.steps_done} of {config.num_steps} steps"
    return "" if outcome.finished else f"{outcome.name} stopped after {done}"


def is_complete(config: RunConfig, place: Surroundings) -> bool:
    """Whether running this configuration would do nothing."""
    if place.tracking == "wandb" and not (place.results / config.name / RUN_ID).exists():
        return False  # what was recorded here alone is still to be sent
    try:
        training = place.with_kept_seed(training_of(config))
        if training.task_config.seed is None:
            return False
        if isinstance(config, LLCConfig):
            assert isinstance(training, TrainingConfig)
            config = config.of(training)
            estimates_of(config, place)
            done = {row["step"] for row in read_estimates(place.results / config.name)}
            return bool(done) and set(config.chosen_steps(subject_of(config, place).steps())) <= done
        checkpoints = place.checkpoints(training)
        training = training.resolved()
        finished = checkpoints.finished_step() is not None
        return finished and first_missing_step(training, checkpoints) == training.num_steps
    except (ConfigError, CheckpointError, StorageError):
        return False  # the run itself will say what is wrong
