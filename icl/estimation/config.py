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


class PlottingConfig(Settings):
    """Figures drawn of each estimate."""

    include_loss_trace: bool = Field(default=False, description="draw the chains' losses")
    include_weights_pca: bool = Field(default=False, description="draw the chains in their principal components")
    num_components: int = Field(default=3, ge=2, description="principal components of the draws")
    num_points: int = Field(default=10, ge=2, description="points per axis of the loss landscape behind them")


class LLCConfig(Settings):
    """At which checkpoints of a training run to sample, and how.

    A sweep file holds the settings of the training run beside the others; the checkpoints are found by them. At most one of
    `steps` (a grid), `step` (one) and `checkpoint_idx` (an index into the sorted checkpoints) is given. None of them
    means every checkpoint, as in the reference code. A step without a checkpoint is replaced by the nearest step that
    has one.
    """

    flattened = ("training",)
    decides = ("sampler_config", "steps", "step", "checkpoint_idx", "testing")

    training: TrainingConfig = Field(
        default=TrainingConfig(), description="the training run whose checkpoints these are"
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

    @property
    def metrics(self) -> tuple[EvalMetric, ...]:
        """The sampler's metrics, and the weights where a figure is drawn from them."""
        metrics = self.sampler_config.eval_metrics
        return (
            (*metrics, "weights") if self.plotting_config.include_weights_pca and "weights" not in metrics else metrics
        )

    @property
    def name(self) -> str:
        """The name of this estimate: the training run's, and a hash of the sampler's settings and the choice of
        steps."""
        decisive = self.decisive(*self.decides)
        sampler = decisive["sampler_config"]
        # The names of results outlive defaults.
        sampler["max_memory_bytes"] = sampler["max_memory_bytes"] or TRACE_BYTES
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
        return f"llc-{self.training.name}-{digest}"

    def identity(self) -> dict[str, Any]:
        """Plain data of what decides the estimates: the training run, how it is sampled, and where."""
        own = super().identity()
        sampler = {name: value for name, value in own["sampler_config"].items() if name not in MEANS}
        return {**self.training.identity(), **own, "sampler_config": sampler}

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
            raise ConfigError(f"the run {self.training.name} has no checkpoints; train it first with the same settings")
        if self.step is not None:
            chosen = self._nearest([self.step], present)
        elif self.checkpoint_idx is not None:
            if not -len(present) <= self.checkpoint_idx < len(present):
                raise ConfigError(
                    f"checkpoint_idx={self.checkpoint_idx} is out of range: the run has {len(present)} checkpoints"
                )
            chosen = [present[self.checkpoint_idx]]
        elif self.steps is not None:
            chosen = self._nearest(expand_steps(self.steps, self.training.num_steps), present)
        else:
            chosen = list(present)
        return [chosen[0], chosen[-1]][: len(chosen)] if self.testing else chosen

    def _nearest(self, wanted: Sequence[int], present: Sequence[int]) -> list[int]:
        """The present checkpoints nearest to those wanted."""
        if not wanted:
            raise ConfigError("steps is empty; leave it out to sample at every checkpoint")
        last = min(max(wanted), self.training.num_steps - 1)
        if last > present[-1]:
            raise ConfigError(
                f"step {last} is chosen, but {self.training.name} has checkpoints up to step {present[-1]} only; train it on, or choose "
                "earlier steps"
            )
        return sorted({nearest_step(present, step) for step in wanted})
