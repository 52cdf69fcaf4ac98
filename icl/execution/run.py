"""One run of a sweep, training or estimates, to its end."""

from collections.abc import Mapping
from typing import Literal

from icl.config import TrainingConfig
from icl.estimation import LLCConfig
from icl.execution.llc_run import run_llc
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training

Command = Literal["train", "llc"]

CONFIGS: Mapping[Command, type[TrainingConfig]] = {"train": TrainingConfig, "llc": LLCConfig}
"""The settings that the sweep file of a command holds."""


def run_point(config: TrainingConfig, place: Surroundings) -> str:
    """Do what is missing of a run; returns what is left to do in one line, or nothing if it is done.

    Raises:
        ConfigError, RunInUseError, CheckpointError, StorageError, TrainingDiverged: see `run_training` and `run_llc`.
    """
    if isinstance(config, LLCConfig):
        left = run_llc(config, place)
        return f"{config.llc_name} stopped with {left} checkpoints left" if left else ""
    outcome = run_training(config, place)
    done = f"{outcome.steps_done} of {config.num_steps} steps"
    return "" if outcome.finished else f"{outcome.name} stopped after {done}"
