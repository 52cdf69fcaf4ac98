"""The fixed sequences on which a run is analysed.

All checkpoints of a run are measured on the same sequences, which depend only on seeds. So differences between rows of a
table are differences between models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from icl.config import Settings, TrainingConfig
from icl.evals import VALIDATION_SIZE, ValidationSet, make_evaluator
from icl.model import InContextRegressionTransformer
from icl.streams import Stream

ROOT_SIZE = 512
"""The number of sequences of the joint trajectory PCA, as in arXiv 2501.17745."""


class DataSettings(Settings):
    """Which sequences the analyses use."""

    validation_seed: int = Field(default=0, description="seed of the validation set")
    validation_size: int = Field(default=VALIDATION_SIZE, description="number of sequences of the validation set")
    noise_std: float | None = Field(
        default=None,
        description="standard deviation of the noise in the labels; None: √σ² of the training distribution. 0.125 gives the "
        "distribution of the reference code's figures, which use the training variance 0.125 as standard deviation",
    )


@dataclass(frozen=True)
class AnalysisData:
    """The fixed sequences of a run's analyses. Each part is made when it is first needed.

    Attributes:
        config: settings of the training run, with resolved seeds.
        settings: which sequences are used.
        device: the device that holds them.
    """

    config: TrainingConfig
    settings: DataSettings = field(default_factory=DataSettings)
    device: torch.device | str = "cpu"

    @cached_property
    def validation(self) -> ValidationSet:
        """Gaussian-task sequences with their tasks and the noise of the out-of-distribution sets."""
        chosen = self.settings
        drawn = ValidationSet.draw(
            self.config.task_config.true_task(), chosen.validation_seed, chosen.validation_size, chosen.noise_std
        )
        errors = {gain: noise.to(self.device) for gain, noise in drawn.errors.items()}
        return ValidationSet(
            drawn.xs.to(self.device),
            drawn.ys.to(self.device),
            drawn.tasks.to(self.device),
            errors,
            drawn.law,
        )

    @cached_property
    def evaluator(self) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
        """The metrics logged during training."""
        return make_evaluator(self.config, self.device)

    @cached_property
    def training_tasks(self) -> Tensor | None:
        """The list of training tasks (M, D), or None for Gaussian tasks."""
        task = self.config.task_config.pretrain_task()
        return None if task.num_tasks is None else task.tasks.to(self.device)

    @cached_property
    def training_sequences(self) -> tuple[Tensor, Tensor]:
        """The evaluator's sequences of the training distribution: xs (B, K, D), ys (B, K, 1)."""
        stream = Stream(_given(self.config.task_config.true_seed), "evaluation/pretrain")
        return self.config.task_config.pretrain_task().sample(stream, 0, self.config.eval_batch_size, self.device)

    @cached_property
    def gaussian_sequences(self) -> tuple[Tensor, Tensor]:
        """The evaluator's sequences of Gaussian tasks: xs (B, K, D), ys (B, K, 1)."""
        stream = Stream(_given(self.config.task_config.true_seed), "evaluation/true")
        return self.config.task_config.true_task().sample(stream, 0, self.config.eval_batch_size, self.device)

    @cached_property
    def root_sequences(self) -> tuple[Tensor, Tensor]:
        """512 sequences of the first training task, xs (B, K, D), ys (B, K, 1). Runs of one family share this task."""
        task = self.config.task_config
        root = task.model_copy(update={"num_tasks": 1}).pretrain_task()
        return root.sample(Stream(_given(task.true_seed), "evaluation/root"), 0, ROOT_SIZE, self.device)


def _given(seed: int | None) -> int:
    assert seed is not None, "seeds are resolved before use"
    return seed


Measure = Callable[[InContextRegressionTransformer, AnalysisData], pd.DataFrame]
"""The analysis of one checkpoint: (model, fixed data) -> rows of a table."""


@dataclass(frozen=True)
class FamilyRun:
    """One run of a family. A family is a set of runs that differ only in the number of training tasks M.

    Attributes:
        data: the sequences on which the run is measured.
        steps: the steps of its checkpoints.
        model: step -> model.
    """

    data: AnalysisData
    steps: Sequence[int]
    model: Callable[[int], InContextRegressionTransformer]


FamilyMeasure = Callable[[Mapping[float, FamilyRun]], Mapping[str, pd.DataFrame]]
"""The analysis of a family: {M (infinity for Gaussian tasks): run} -> {name: table}."""


@dataclass(frozen=True)
class JointMeasure:
    """An analysis of all runs of a family together.

    Attributes:
        measure: the function. Its table with the name of the analysis has the columns `num_tasks` and `step`.
        beside: the names of its other tables.
    """

    measure: FamilyMeasure
    beside: tuple[str, ...] = ()
