"""One run of a sweep, either training or estimates: parse its settings, tell whether it is complete, and do it."""

from collections.abc import Mapping
from typing import Any, Literal

from icl.checkpoints import CheckpointError
from icl.config import ConfigError, TrainingConfig
from icl.config.kinds import parse_training
from icl.estimation import LLCConfig
from icl.estimation.traces import read_estimates
from icl.execution.llc_run import refuse_changed_weights, results_folder, run_llc, subject_of
from icl.execution.names import RunConfig, training_of
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import StorageError
from icl.tracking.wandb import RUN_ID
from icl.training import first_missing_step

Command = Literal["train", "llc"]
CONFIGS: Mapping[Command, type[RunConfig]] = {"train": TrainingConfig, "llc": LLCConfig}
"""Command -> the class of settings in its sweep files."""


def parse_config(command: Command, data: Mapping[str, Any]) -> RunConfig:
    """The settings of one point of a command's sweep, for any kind of run.

    Raises:
        ConfigError: see `Settings.parse`.
    """
    return parse_training(data) if command == "train" else CONFIGS[command].parse(data)


def run_point(config: RunConfig, place: Surroundings) -> str:
    """Do what is missing of a run. Returns one line about what is left to do, or an empty text if it is done.

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
        return False  # the local record must still be sent to W&B
    try:
        training = place.with_kept_seed(training_of(config))
        if training.task_config.seed is None:
            return False
        if isinstance(config, LLCConfig):
            assert isinstance(training, TrainingConfig)
            config = config.of(training)
            results_folder(config, place)
            if not (rows := read_estimates(place.results / config.name)):
                return False
            subject = subject_of(config, place)
            chosen = set(config.chosen_steps(subject.steps()))
            refuse_changed_weights(config, subject, rows, chosen)
            return chosen <= {row["step"] for row in rows}
        checkpoints = place.checkpoints(training)
        training = training.resolved()
        finished = checkpoints.finished_step() is not None
        return finished and first_missing_step(training, checkpoints) == training.num_steps
    except (ConfigError, CheckpointError, StorageError):
        return False  # the run itself will report what is wrong
