"""The fixed sequences that analyses of a run measure on.

All checkpoints of a run are measured on the same sequences, which are functions of seeds, so that differences between
rows are differences between models.
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
"""Sequences of the joint trajectory PCA, as in arXiv 2501.17745."""


class DataSettings(Settings):
    """Which sequences the analyses use."""

    validation_seed: int = Field(default=0, description="seed of the validation set")
    validation_size: int = Field(default=VALIDATION_SIZE, description="sequences of the validation set")
    noise_std: float | None = Field(
        default=None,
        description="standard deviation of the labels' noise; None: √σ² of the training distribution. 0.125 gives the law "
        "of the reference code's figures, which take the training variance for it",
    )


@dataclass(frozen=True)
class AnalysisData:
    """The fixed sequences of a run's analyses; each part is made when it is first needed.

    Attributes:
        config: of the training run, seeds resolved.
        settings: which sequences.
        device: where they lie.
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
        """512 sequences of the first training task, which runs with nested lists of tasks share: xs (B, K, D), ys (B, K, 1)."""
        task = self.config.task_config
        root = task.model_copy(update={"num_tasks": 1}).pretrain_task()
        return root.sample(Stream(_given(task.true_seed), "evaluation/root"), 0, ROOT_SIZE, self.device)


def _given(seed: int | None) -> int:
    assert seed is not None, "seeds are resolved before use"
    return seed


Measure = Callable[[InContextRegressionTransformer, AnalysisData], pd.DataFrame]
"""The analysis of one checkpoint: a model and fixed data in, rows of a table out."""


@dataclass(frozen=True)
class FamilyRun:
    """One run of a family.

    Attributes:
        data: the sequences that it is measured on.
        steps: its checkpoints.
        model: a step -> the model.
    """

    data: AnalysisData
    steps: Sequence[int]
    model: Callable[[int], InContextRegressionTransformer]


FamilyMeasure = Callable[[Mapping[float, FamilyRun]], Mapping[str, pd.DataFrame]]
"""M (infinity for Gaussian tasks) -> its run in, tables by name out."""


@dataclass(frozen=True)
class JointMeasure:
    """The analysis of all runs of a family together.

    Attributes:
        measure: what it does. The table of the analysis' own name has the columns `num_tasks` and `step`.
        beside: the names of the other tables that it makes.
    """

    measure: FamilyMeasure
    beside: tuple[str, ...] = ()
