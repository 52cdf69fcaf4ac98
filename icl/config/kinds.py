"""The kinds of training runs. `task_config.task_type` tells them apart."""

from collections.abc import Mapping
from typing import Any

from icl.config.language import LanguageTraining
from icl.config.training import Training, TrainingConfig

KINDS: Mapping[str, type[Training]] = {"language": LanguageTraining}
"""`task_type` -> the class of its settings. All other types are in-context linear regression."""


def training_kind(data: Mapping[str, Any]) -> type[Training]:
    """The class of settings to which plain data belong."""
    task = data.get("task_config")
    return KINDS.get(str(task.get("task_type")), TrainingConfig) if isinstance(task, Mapping) else TrainingConfig


def parse_training(data: Mapping[str, Any]) -> Training:
    """The settings of a training run of any kind.

    Raises:
        ConfigError: see `Settings.parse`.
    """
    return training_kind(data).parse(data)
