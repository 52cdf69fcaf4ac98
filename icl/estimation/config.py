"""Every setting of the estimates along a run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from icl.config import ConfigError, Settings, StepGrid, TrainingConfig, expand_steps
from icl.config.settings import finite
from icl.config.steps import STEP_GRID, nearest_step, refuse_missing_steps, spread_in_log_time
from icl.sampling import SamplerConfig
from icl.sampling.config import EvalMetric
from icl.sampling.llc import TRACE_BYTES
from icl.sampling.presets import MEANS, PRESETS, preset_named
from icl.subjects.named import SHIPPED, short_name
from icl.subjects.regression import TaskLaw

REGRESSION = "regression"
"""The name of the subject "a training run of this library"."""


class PlottingConfig(Settings):
    """Which figures are drawn of each estimate."""

    include_loss_trace: bool = Field(default=False, description="draw the chains' losses")
    include_weights_pca: bool = Field(default=False, description="draw the chains in their principal components")
    num_components: int = Field(default=3, ge=2, description="principal components of the draws")
    num_points: int = Field(default=10, ge=2, description="points per axis of the loss landscape behind them")


class LLCConfig(Settings):
    """How to sample, and at which checkpoints of a subject.

    The subject is a training run of this library, unless `subject` names another one (`icl.subjects`). In a sweep file the settings of the
    training run are written beside the others; they identify the run and so its checkpoints. The settings of another subject are written
    below `subject_config`.

    At most one of `steps` (a list or a grid), `step` (one), `checkpoint_idx` (an index into the sorted checkpoints) and `checkpoints` (how
    many) is given. None of them means every checkpoint, as in the reference code. A named step without a checkpoint is an error, unless
    `nearest` is set. For a grid, the nearest checkpoints are always taken.
    """

    flattened = ("training",)
    later = ("checkpoints", "subject", "subject_config", "grad_tasks", "eval_tasks")
    decides = (
        "subject",
        "subject_config",
        "sampler_config",
        "grad_tasks",
        "eval_tasks",
        "steps",
        "step",
        "checkpoint_idx",
        "checkpoints",
        "testing",
    )

    subject: str = Field(
        default=REGRESSION,
        description=f"what the estimates are about: regression (a training run of this library), {', '.join(SHIPPED)}, or your own class, "
        "as module:Class, importable from the working directory",
    )
    subject_config: Annotated[dict[str, Any], AfterValidator(finite)] = Field(
        default={}, description="settings of a subject other than regression"
    )
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="the training run with the checkpoints (only for the subject regression)"
    )
    sampler_config: SamplerConfig = Field(default=SamplerConfig(), description="how to sample, and what to measure")
    grad_tasks: TaskLaw = Field(
        default="pretrain",
        description="tasks of the data that drive the chains: pretrain (the training tasks) or true (the distribution from which these "
        "were drawn); only for the subject regression",
    )
    eval_tasks: TaskLaw | None = Field(
        default=None,
        description="tasks of the data on which draws are evaluated, if eval_method is not grad-minibatch; null: those of grad_tasks",
    )
    preset: str | None = Field(
        default=None,
        description=f"named settings of the sampler: {', '.join(PRESETS)}; settings in sampler_config override them",
    )
    steps: StepGrid = Field(
        default=None, description=f"training steps to sample at: {STEP_GRID}; null: every checkpoint"
    )
    step: int | None = Field(default=None, ge=0, description="the one training step to sample at")
    checkpoint_idx: int | None = Field(
        default=None,
        description="the one checkpoint to sample at: its index among the run's checkpoints, -1 for the last",
    )
    checkpoints: int | None = Field(
        default=None, ge=1, description="how many checkpoints to sample at, evenly in log t; 1: the last"
    )
    nearest: bool = Field(
        default=False,
        description="whether to take the nearest checkpoint for a step that has none; otherwise such a step is an error",
    )
    plotting_config: PlottingConfig = Field(default=PlottingConfig(), description="figures of each estimate")
    testing: bool = Field(default=False, description="sample only at the first and the last of the chosen steps")

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("preset"), str):
            return data
        preset = preset_named(data["preset"]).model_dump(mode="json", exclude_unset=True)
        own = data.get("sampler_config") or {}
        return {**data, "sampler_config": {**preset, **own}} if isinstance(own, Mapping) else data

    @model_validator(mode="after")
    def _one_choice_of_steps(self) -> Self:
        given = [name for name in ("steps", "step", "checkpoint_idx", "checkpoints") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both choose the checkpoints; keep one of them")
        return self

    @model_validator(mode="after")
    def _settings_of_one_subject(self) -> Self:
        if self.is_regression and self.subject_config:
            raise ValueError(
                "subject_config is for the settings of another subject, but no subject is named; name it, as subject: {value: "
                "my_module:MySubject}. The settings of a regression run (task_config, num_steps, ...) are written beside subject_config"
            )
        if not self.is_regression:
            given = sorted(self.training.model_fields_set)
            if given:
                raise ValueError(
                    f"{given[0]} is a setting of the regression run, but the subject is {self.subject}; write its settings below "
                    "subject_config"
                )
            if "covariance" in self.sampler_config.eval_metrics:
                raise ValueError(
                    "eval_metrics: covariance is defined only for the library's own transformer; leave it out, or use weights"
                )
        return self

    @model_validator(mode="after")
    def _data_that_are_met(self) -> Self:
        refined = self.grad_tasks != "pretrain" or self.eval_tasks is not None
        if refined and not self.is_regression:
            raise ValueError(
                f"grad_tasks and eval_tasks are settings of the regression run, but the subject is {self.subject}; remove them: its "
                "methods batches and eval_batches choose the data"
            )
        if self.eval_tasks not in (None, self.grad_tasks) and self.sampler_config.eval_method == "grad-minibatch":
            raise ValueError(
                f"eval_tasks={self.eval_tasks!r} has no effect with eval_method='grad-minibatch', which evaluates on the gradient's "
                "batches; choose eval_method new-minibatch, fixed-minibatch or dataset"
            )
        return self

    @property
    def is_regression(self) -> bool:
        """Whether the subject is a training run of this library."""
        return self.subject == REGRESSION

    def writes(self, flattened: str) -> bool:
        """Whether a flattened record is part of dumps: `training` is left out if the subject is not a training run."""
        return flattened != "training" or self.is_regression

    @property
    def subject_name(self) -> str:
        """The name of the training run, or the name of the subject's class."""
        return self.training.name if self.is_regression else short_name(self.subject)

    @property
    def metrics(self) -> tuple[EvalMetric, ...]:
        """The sampler's metrics, with `weights` added if a figure needs them."""
        metrics = self.sampler_config.eval_metrics
        return (
            (*metrics, "weights") if self.plotting_config.include_weights_pca and "weights" not in metrics else metrics
        )

    @property
    def name(self) -> str:
        """The name of these estimates: the subject's name and a hash of its settings, the sampler's, and the choice of steps."""
        decisive = self.decisive(*self.decides)
        sampler = decisive["sampler_config"]
        # This was the default when names were first made. Names must not change when a default does.
        sampler["max_memory_bytes"] = sampler["max_memory_bytes"] or TRACE_BYTES
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
        return f"llc-{self.subject_name}-{digest}"

    def identity(self) -> dict[str, Any]:
        """Plain data of all settings that decide the estimates: the subject, the sampler, and the checkpoints."""
        own = super().identity()
        sampler = {name: value for name, value in own["sampler_config"].items() if name not in MEANS}
        training = self.training.identity() if self.is_regression else {}
        return {**training, **own, "sampler_config": sampler}

    def resolved(self) -> Self:
        """A copy in which all seeds of the training run are numbers."""
        return self.of(self.training.resolved())

    def of(self, training: TrainingConfig) -> Self:
        """A copy with another training run."""
        return self.model_copy(update={"training": training})

    def chosen_steps(self, present: Sequence[int]) -> list[int]:
        """The checkpoints to sample at, out of those present (sorted).

        Raises:
            ConfigError: there are no checkpoints, `checkpoint_idx` is out of range, or the run has not been trained far
                enough for the chosen steps.
        """
        if not present:
            raise ConfigError(f"the run {self.subject_name} has no checkpoints; train it first with the same settings")
        if self.step is not None:
            chosen = self._named([self.step], present)
        elif self.checkpoints is not None:
            chosen = spread_in_log_time(present, self.checkpoints) if self.checkpoints > 1 else [present[-1]]
        elif self.steps is not None and not isinstance(self.steps, Mapping):
            chosen = self._named(self.steps, present)
        elif self.checkpoint_idx is not None:
            if not -len(present) <= self.checkpoint_idx < len(present):
                raise ConfigError(
                    f"checkpoint_idx={self.checkpoint_idx} is out of range: the run has {len(present)} checkpoints"
                )
            chosen = [present[self.checkpoint_idx]]
        elif self.steps is not None:
            chosen = self._nearest(self._reached(present), present)
        else:
            chosen = list(present)
        return [chosen[0], chosen[-1]][: len(chosen)] if self.testing else chosen

    def substitutes(self, present: Sequence[int]) -> dict[int, int]:
        """Each wanted step that has no checkpoint -> the nearest checkpoint, which is used instead."""
        if self.step is None and self.steps is None:
            return {}
        wanted = [self.step] if self.step is not None else self._reached(present)
        return {step: nearest_step(present, step) for step in wanted if step not in set(present)}

    def _reached(self, present: Sequence[int]) -> list[int]:
        """The steps of the grid or the list."""
        return (
            expand_steps(self.steps, self._num_steps(present))
            if isinstance(self.steps, Mapping)
            else list(self.steps or ())
        )

    def _named(self, wanted: Sequence[int], present: Sequence[int]) -> list[int]:
        """The checkpoints at exactly these steps, or the nearest ones if `nearest` is set."""
        nearest = self._nearest(wanted, present)
        if self.nearest:
            return nearest
        refuse_missing_steps(wanted, present, self.subject_name)
        return sorted(set(wanted))

    def _nearest(self, wanted: Sequence[int], present: Sequence[int]) -> list[int]:
        """The present checkpoints nearest to the wanted steps."""
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
        """The planned length of the run. The run of another subject has no plan and ends at its last checkpoint."""
        return self.training.num_steps if self.is_regression else present[-1] + 1
