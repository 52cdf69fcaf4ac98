"""Every setting of the library, and the sweep files that hold them."""

from icl.config.settings import ConfigError, Settings
from icl.config.steps import StepGrid, expand_steps
from icl.config.training import OptimizerConfig, TaskConfig, Training, TrainingConfig

__all__ = [
    "ConfigError", "OptimizerConfig", "Settings", "StepGrid", "TaskConfig", "Training", "TrainingConfig", "expand_steps",
]  # fmt: skip
