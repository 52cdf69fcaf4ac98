"""Every setting of the estimates along a run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from icl.config import ConfigError, Settings, StepGrid, TrainingConfig, expand_steps
from icl.config.steps import STEP_GRID, nearest_step, refuse_missing_steps, spread_in_log_time
from icl.sampling import SamplerConfig
from icl.sampling.config import EvalMetric
from icl.sampling.llc import TRACE_BYTES
from icl.sampling.presets import MEANS, preset_named


class PlottingConfig(Settings):
    """Figures drawn of each estimate."""

    include_loss_trace: bool = Field(default=False, description="draw the chains' losses")
    include_weights_pca: bool = Field(default=False, description="draw the chains in their principal components")
    num_components: int = Field(default=3, ge=2, description="principal components of the draws")
    num_points: int = Field(default=10, ge=2, description="points per axis of the loss landscape behind them")


class LLCConfig(Settings):
    """At which checkpoints of a training run to sample, and how.

    A sweep file holds the settings of the training run beside the others; the checkpoints are found by them. At most one of
    `steps` (a list or a grid), `step` (one), `checkpoint_idx` (an index into the sorted checkpoints) and `checkpoints` (how
    many) is given. None of them means every checkpoint, as in the reference code. A step that is named and has no
    checkpoint is an error, unless `nearest` is set; for the steps of a grid the nearest checkpoints are taken.
    """

    flattened = ("training",)
    later = ("checkpoints",)
    decides = ("sampler_config", "steps", "step", "checkpoint_idx", "checkpoints", "testing")

    training: TrainingConfig = Field(
        default=TrainingConfig(), description="the training run whose checkpoints these are"
    )
    sampler_config: SamplerConfig = Field(default=SamplerConfig(), description="how to sample, and what to measure")
    preset: str | None = Field(
        default=None,
        description="named settings of the sampler: automatic, calibrated or published; those of sampler_config come on top",
    )
    steps: StepGrid = Field(
        default=None, description=f"training steps to sample at: {STEP_GRID}; null: every checkpoint"
    )
    step: int | None = Field(default=None, ge=0, description="the one training step to sample at")
    checkpoint_idx: int | None = Field(
        default=None, description="the one checkpoint to sample at: its place among the run's, -1 for the last"
    )
    checkpoints: int | None = Field(
        default=None, ge=1, description="how many checkpoints to sample at, evenly in log t; 1: the last"
    )
    nearest: bool = Field(
        default=False,
        description="whether a step without a checkpoint means the nearest that has one; else it is an error",
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
            chosen = self._nearest(self._reached(), present)
        else:
            chosen = list(present)
        return [chosen[0], chosen[-1]][: len(chosen)] if self.testing else chosen

    def substitutes(self, present: Sequence[int]) -> dict[int, int]:
        """Step that the grid reaches, or that is named with `nearest`, and has no checkpoint -> the checkpoint in its place."""
        if self.step is None and self.steps is None:
            return {}
        wanted = [self.step] if self.step is not None else self._reached()
        return {step: nearest_step(present, step) for step in wanted if step not in set(present)}

    def _reached(self) -> list[int]:
        """The steps of the grid, or of the list."""
        return (
            expand_steps(self.steps, self.training.num_steps)
            if isinstance(self.steps, Mapping)
            else list(self.steps or ())
        )

    def _named(self, wanted: Sequence[int], present: Sequence[int]) -> list[int]:
        """The checkpoints at exactly these steps, or with `nearest` near them."""
        nearest = self._nearest(wanted, present)
        if self.nearest:
            return nearest
        refuse_missing_steps(wanted, present, self.training.name)
        return sorted(set(wanted))

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
