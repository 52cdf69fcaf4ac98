"""The reference code's checkpoint files (public code of arXiv 2402.02364) as a subject: its transformer, on the task of its training."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from icl.checkpoints import load_reference_checkpoint, load_reference_state_dict
from icl.config import TaskConfig, TrainingConfig
from icl.model import InContextRegressionTransformer
from icl.subjects.folder import files_by_step
from icl.subjects.regression import RegressionRun


class Settings(BaseModel):
    """What `subject_config` holds: the files, and the settings of the model and the task."""

    model_config = ConfigDict(extra="forbid")

    path: str
    task_config: dict[str, Any] = {}


class ReferenceFiles:
    """The weights of `.pt` files in the reference code's names, by step."""

    def __init__(self, path: str, task: TaskConfig) -> None:
        self._files: dict[int, Path] = files_by_step(path)
        self._shape = task.shape

    def steps(self) -> list[int]:
        """Ascending."""
        return sorted(self._files)

    def load(self, step: int) -> dict[str, Tensor]:
        """Weights in the library's names; raises `CheckpointError` for a file that is none of the reference code's."""
        model = InContextRegressionTransformer.from_shape(self._shape, seed=0)
        load_reference_state_dict(model, load_reference_checkpoint(self._files[step]))
        return model.state_dict()


class ReferenceRun(RegressionRun):
    """A run of the reference code."""

    Settings = Settings

    def __init__(self, path: str, task_config: dict[str, Any]) -> None:
        task = TaskConfig.parse(task_config)
        super().__init__(TrainingConfig(task_config=task).resolved(), ReferenceFiles(path, task))
