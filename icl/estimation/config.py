"""Every setting of the estimates along a run."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from icl.config import ConfigError, Settings, StepGrid, TrainingConfig, expand_steps
from icl.config.steps import STEP_GRID, nearest_step
from icl.sampling import SamplerConfig
from icl.sampling.config import EvalMetric
from icl.sampling.llc import TRACE_BYTES
from icl.sampling.presets import MEANS
from icl.subjects.named import short_name

REGRESSION = "regression"
"""The name of the subject that a training run of this library is."""


class PlottingConfig(Settings):
    """Figures drawn of each estimate."""

    include_loss_trace: bool = Field(default=False, description="draw the chains' losses")
    include_weights_pca: bool = Field(default=False, description="draw the chains in their principal components")
    num_components: int = Field(default=3, ge=2, description="principal components of the draws")
    num_points: int = Field(default=10, ge=2, description="points per axis of the loss landscape behind them")


class LLCConfig(Settings):
    """How to sample at which checkpoints of a subject.

    The subject is a training run of this library, unless `subject` names another one (`icl.subjects`). In a sweep file the settings of the
    training run, which find its checkpoints, stand beside the others; those of another subject stand below `subject_config`. At most one of
    `steps` (a grid), `step` (one) and `checkpoint_idx` (an index into the sorted checkpoints) is given. None of them
    means every checkpoint, as in the reference code. A step without a checkpoint is replaced by the nearest step that
    has one.
    """

    flattened = ("training",)
    later = ("subject", "subject_config")
    decides = ("subject", "subject_config", "sampler_config", "steps", "step", "checkpoint_idx", "testing")

    subject: str = Field(
        default=REGRESSION,
        description="what the estimates are about: regression (a training run of this library), or a class of your own, "
        "as module:Class, looked for from the working directory",
    )
    subject_config: dict[str, Any] = Field(default={}, description="settings of a subject other than regression")
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="the training run whose checkpoints these are (subject regression alone)"
    )
    sampler_config: SamplerConfig = Field(default=SamplerConfig(), description="how to sample, and what to measure")
    steps: StepGrid = Field(
        default=None, description=f"training steps to sample at: {STEP_GRID}; null: every checkpoint"
    )
    step: int | None = Field(default=None, ge=0, description="the one training step to sample at")
    checkpoint_idx: int | None = Field(
        default=None, description="the one checkpoint to sample at: its place among the run's, -1 for the last"
    )
    plotting_config: PlottingConfig = Field(default=PlottingConfig(), description="figures of each estimate")
    testing: bool = Field(default=False, description="sample only at the first and the last of the chosen steps")

    @model_validator(mode="after")
    def _one_choice_of_steps(self) -> Self:
        given = [name for name in ("steps", "step", "checkpoint_idx") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both choose the checkpoints; keep one of them")
        return self

    @model_validator(mode="after")
    def _settings_of_one_subject(self) -> Self:
        if self.is_regression and self.subject_config:
            raise ValueError(
                "subject_config holds the settings of another subject, and those of the regression run stand beside it (task_config, "
                "num_steps, ...); name the subject, as subject: {value: my_module:MySubject}"
            )
        if not self.is_regression:
            given = sorted(self.training.model_fields_set)
            if given:
                raise ValueError(
                    f"{given[0]} is a setting of the regression run, and the subject is {self.subject}; its own settings stand below "
                    "subject_config"
                )
            if "covariance" in self.sampler_config.eval_metrics:
                raise ValueError(
                    "eval_metrics: covariance is that of weight groups of the library's own transformer; leave it out, or take weights"
                )
        return self

    @property
    def is_regression(self) -> bool:
        """Whether the subject is a training run of this library."""
        return self.subject == REGRESSION

    def writes(self, flattened: str) -> bool:
        """The settings of a training run say nothing of another subject."""
        return flattened != "training" or self.is_regression

    @property
    def subject_name(self) -> str:
        """The training run's name, or that of the subject's class."""
        return self.training.name if self.is_regression else short_name(self.subject)

    @property
    def metrics(self) -> tuple[EvalMetric, ...]:
        """The sampler's metrics, and the weights where a figure is drawn from them."""
        metrics = self.sampler_config.eval_metrics
        return (
            (*metrics, "weights") if self.plotting_config.include_weights_pca and "weights" not in metrics else metrics
        )

    @property
    def name(self) -> str:
        """The name of this estimate: the subject's, and a hash of its settings, the sampler's, and the choice of steps."""
        decisive = self.decisive(*self.decides)
        sampler = decisive["sampler_config"]
        # The names of results outlive defaults.
        sampler["max_memory_bytes"] = sampler["max_memory_bytes"] or TRACE_BYTES
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
        return f"llc-{self.subject_name}-{digest}"

    def identity(self) -> dict[str, Any]:
        """Plain data of what decides the estimates: the subject, how it is sampled, and where."""
        own = super().identity()
        sampler = {name: value for name, value in own["sampler_config"].items() if name not in MEANS}
        training = self.training.identity() if self.is_regression else {}
        return {**training, **own, "sampler_config": sampler}

    def resolved(self) -> Self:
        """The same with all seeds of the training run given."""
        return self.of(self.training.resolved())

    def of(self, training: TrainingConfig) -> Self:
        """The same along another training run."""
        return self.model_copy(update={"training": training})

    def chosen_steps(self, present: Sequence[int]) -> list[int]:
        """The checkpoints to sample at, out of those present (sorted).

        Raises:
            ConfigError: there is none, `checkpoint_idx` is outside their range, or the run has not been trained as far as
            the choice reaches.
        """
        if not present:
            raise ConfigError(f"the run {self.subject_name} has no checkpoints; train it first with the same settings")
        if self.step is not None:
            chosen = self._nearest([self.step], present)
        elif self.checkpoint_idx is not None:
            if not -len(present) <= self.checkpoint_idx < len(present):
                raise ConfigError(
                    f"checkpoint_idx={self.checkpoint_idx} is out of range: the run has {len(present)} checkpoints"
                )
            chosen = [present[self.checkpoint_idx]]
        elif self.steps is not None:
            chosen = self._nearest(expand_steps(self.steps, self._num_steps(present)), present)
        else:
            chosen = list(present)
        return [chosen[0], chosen[-1]][: len(chosen)] if self.testing else chosen

    def _nearest(self, wanted: Sequence[int], present: Sequence[int]) -> list[int]:
        """The present checkpoints nearest to those wanted."""
        if not wanted:
            raise ConfigError("steps is empty; leave it out to sample at every checkpoint")
        last = min(max(wanted), self._num_steps(present) - 1)
        if last > present[-1]:
            raise ConfigError(
                f"step {last} is chosen, but {self.subject_name} has checkpoints up to step {present[-1]} only; train it on, or choose "
                "earlier steps"
            )
        return sorted({nearest_step(present, step) for step in wanted})

    def _num_steps(self, present: Sequence[int]) -> int:
        """The length of the run: as planned, or where nobody says so up to its last checkpoint."""
        return self.training.num_steps if self.is_regression else present[-1] + 1
