"""All settings of a training run, typed and validated, each with a default.

The keys are those of the reference code's sweep files. So a sweep's `parameters` map one to one onto these records.
Nothing here reads the environment or touches a disk.
"""

import hashlib
import json
import math
import secrets
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from icl.config.settings import Settings
from icl.config.steps import STEP_GRID, StepGrid, expand_steps
from icl.model import TransformerShape
from icl.storage.keys import MAX_SEGMENT_LENGTH, is_key
from icl.streams import Stream
from icl.tasks import TASKS, RegressionTask


def _as_task_count(value: Any) -> Any:
    if value == "inf" or value == math.inf or value is None:
        return None
    return value


NumTasks = Annotated[Annotated[int, Field(ge=1, le=2**30)] | None, BeforeValidator(_as_task_count)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)] | None


class TaskSettings(Settings):
    """The task and the model of a training run. Each kind of run has its own subclass."""

    derived: ClassVar[tuple[str, ...]] = ()
    """Names of seeds that, if null, are derived from the model's seed."""

    @property
    @abstractmethod
    def seed(self) -> int | None:
        """The seed of the initial weights."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Readable sizes, for the run's name."""

    def resolved(self) -> Self:
        """A copy in which every null seed is a number. A null model_seed is drawn from the system's entropy; the other
        seeds are derived from model_seed.

        In the reference code, null seeds continue the random state after the model's initialisation. So there too the
        model seed decides the data. Here each derived seed is independent.
        """
        seed = secrets.randbits(31) if self.seed is None else self.seed
        drawn = {
            name: Stream(seed, f"seeds/{name}").key()[0] & 0x7FFFFFFF
            for name in self.derived
            if getattr(self, name) is None
        }
        return self.model_copy(update={"model_seed": seed, **drawn})


Task = TypeVar("Task", bound=TaskSettings)


class TaskConfig(TaskSettings):
    """The task and the model of in-context linear regression."""

    later = ("task_type",)
    derived = ("pretrain_seed", "true_seed", "sampling_seed")

    task_type: str = Field(
        default="linear",
        description=f"the distribution of sequences, by its name in icl.tasks.TASKS: {', '.join(TASKS)}",
    )
    task_size: int = Field(default=8, ge=1, le=2**16, description="D, the dimension of inputs and tasks")
    max_examples: int = Field(default=16, ge=1, le=2**16, description="K, the number of (x, y) pairs of a sequence")
    num_tasks: NumTasks = Field(
        default=64, description="M, the number of training tasks; inf: a new Gaussian task for every sequence"
    )
    noise_variance: float = Field(default=0.25, ge=0, description="σ², the variance of the noise in the labels y")
    embed_size: int = Field(default=128, ge=1, le=2**16, description="C, the width of the residual stream")
    mlp_size: int = Field(default=128, ge=1, le=2**16, description="width of the hidden layer of each block's MLP")
    num_heads: int = Field(
        default=2, ge=1, le=2**16, description="H, attention heads of a block; embed_size must be a multiple"
    )
    num_layers: int = Field(default=8, ge=1, le=2**10, description="number of transformer blocks")
    model_seed: Seed = Field(
        default=0, description="seed of the initial weights; null: a random one, kept with the run"
    )
    pretrain_seed: Seed = Field(default=1, description="seed of the list of tasks; null: derived from model_seed")
    true_seed: Seed = Field(default=2, description="seed of the evaluation batches; null: derived from model_seed")
    sampling_seed: Seed = Field(default=3, description="seed of the training data; null: derived from model_seed")
    layer_norm: bool = Field(
        default=True, description="whether attention, MLP and unembedding each begin with a layer normalisation"
    )
    include_output: bool = Field(default=False, description="whether attention ends with an output projection")
    residual: Literal["doubled", "single"] = Field(
        default="doubled",
        description="how a block adds its input: twice, as in the reference code, or once, as is standard",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        _ = self.shape
        return self

    @field_validator("task_type")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"there is no such task; known tasks: {', '.join(TASKS)}")
        return value

    @field_serializer("num_tasks")
    def _write_inf(self, value: int | None) -> int | str:
        return "inf" if value is None else value

    @property
    def shape(self) -> TransformerShape:
        """The model's shape."""
        return TransformerShape(
            self.task_size, self.max_examples, self.embed_size, self.mlp_size, self.num_heads, self.num_layers,
            self.layer_norm, self.include_output, self.residual,
        )  # fmt: skip

    @property
    def seed(self) -> int | None:
        """The seed of the initial weights."""
        return self.model_seed

    @property
    def label(self) -> str:
        """Layers, heads, tasks and examples, for the run's name."""
        tasks = "inf" if self.num_tasks is None else self.num_tasks
        return f"L{self.num_layers}H{self.num_heads}M{tasks}-K{self.max_examples}"

    def pretrain_task(self) -> RegressionTask:
        """The training distribution (seeds must be resolved)."""
        law, seed = TASKS[self.task_type], _given(self.pretrain_seed)
        return law(self.task_size, self.max_examples, self.noise_variance, self.num_tasks, seed)

    def true_task(self) -> RegressionTask:
        """The Gaussian-task distribution of the same dimensions."""
        return TASKS[self.task_type](self.task_size, self.max_examples, self.noise_variance)


def _given(seed: int | None) -> int:
    assert seed is not None, "seeds are resolved before use"
    return seed


class OptimizerConfig(Settings):
    """Adam (Kingma & Ba 2015), AdamW or SGD, as torch.optim defines them. `lr` is the maximum of the schedule."""

    optimizer_type: Literal["Adam", "AdamW", "SGD"] = Field(default="Adam", description="the rule of an update")
    lr: float = Field(default=1e-3, gt=0, description="largest learning rate of the schedule")
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999),
        description="decay per step of the running means of the gradient and of its square, each >= 0 and < 1 (Adam, AdamW)",
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the mean squared gradient (Adam, AdamW)")
    weight_decay: float = Field(
        default=0.0, ge=0, description="pull of the weights towards zero; AdamW applies it separately from the gradient"
    )
    momentum: float | None = Field(
        default=None, ge=0, lt=1, description="fraction of the last update that is kept (only SGD)"
    )

    @model_validator(mode="after")
    def _momentum_is_for_sgd(self) -> Self:
        if self.momentum and self.optimizer_type != "SGD":
            raise ValueError(f"momentum is a setting of SGD, not of {self.optimizer_type}; remove it or use betas")
        return self


class SchedulerConfig(Settings):
    """One cycle (Smith & Topin 2019): the rate rises from max_lr/div_factor to max_lr and falls to
    max_lr/(div_factor·final_div_factor).

    The factors default to num_steps/2 - 1, as in the reference code. `scheduler_type: constant` keeps the optimizer's
    rate.
    """

    scheduler_type: Literal["OneCycleLR", "constant"] = Field(
        default="OneCycleLR",
        description="OneCycleLR: the learning rate rises once and falls once; constant: it is optimizer_config.lr",
    )
    anneal_strategy: Literal["linear", "cos"] = Field(default="linear", description="shape of the rise and of the fall")
    pct_start: float = Field(default=0.5, gt=0, lt=1, description="share of the steps over which the rate rises")
    cycle_momentum: Literal[False] = Field(
        default=False, description="must be false; it exists because the reference code's sweep files have it"
    )
    max_lr: float | None = Field(default=None, gt=0, description="the highest rate; null: optimizer_config.lr")
    total_steps: int | None = Field(default=None, ge=2, description="length of the cycle in steps; null: num_steps")
    div_factor: float | None = Field(
        default=None, gt=0, description="highest rate divided by the first; null: num_steps / 2 - 1"
    )
    final_div_factor: float | None = Field(
        default=None, gt=0, description="first rate divided by the last; null: num_steps / 2 - 1"
    )


class CheckpointerConfig(Settings):
    """When checkpoints are written. The environment variables LOCAL_ROOT and AWS_BUCKET_NAME decide where."""

    checkpoint_steps: StepGrid = Field(
        default_factory=lambda: {"log_space": 50, "linear_space": 50},
        description=f"training steps whose weights are kept, in addition to the last step: {STEP_GRID}",
    )
    state_every: int = Field(
        default=1000,
        ge=1,
        description="steps between two saves of the full state, from which an interrupted run continues",
    )
    bucket_name: str | None = Field(
        default=None, description="ignored; the reference code's sweep files have it. Set AWS_BUCKET_NAME instead"
    )


class LoggerConfig(Settings):
    """When metrics are evaluated and logged."""

    logging_steps: StepGrid = Field(
        default_factory=lambda: {"log_space": 100, "linear_space": 100},
        description=f"training steps at which the model is evaluated, in addition to the last step: {STEP_GRID}",
    )
    loss_every: int = Field(
        default=100, ge=1, description="steps between two records of the loss on the training batch"
    )
    project: str | None = Field(default=None, description="W&B project; null: the sweep file's, or icl")
    entity: str | None = Field(default=None, description="W&B user or team; null: the sweep file's, or W&B's default")
    group: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="W&B group, under which W&B shows runs together; null: none",
    )
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        default=(), description="W&B tags, by which runs can be found"
    )
    job_type: str | None = Field(
        default=None, min_length=1, max_length=64, description="W&B job type; null: train, or llc for estimates"
    )
    alert: bool = Field(
        default=True, description="whether W&B sends an alert when a loss is no longer a number, or a chain diverges"
    )
    seed_table: bool = Field(
        default=False,
        description="whether a run that ends shows on W&B the mean, standard deviation and number of its results over all seeds that "
        "are finished so far",
    )


class Training(Settings, Generic[Task]):
    """One training run of any kind. Defaults are the reference code's."""

    later = ("matmul_precision",)
    decides = ("task_config", "optimizer_config", "scheduler_config", "num_steps", "batch_size", "matmul_precision")

    task_config: Task = Field(description="the task and the model")
    optimizer_config: OptimizerConfig = Field(default=OptimizerConfig(), description="how the weights are updated")
    scheduler_config: SchedulerConfig = Field(default=SchedulerConfig(), description="the course of the learning rate")
    checkpointer_config: CheckpointerConfig = Field(default=CheckpointerConfig(), description="when weights are kept")
    logger_config: LoggerConfig = Field(default=LoggerConfig(), description="when metrics are taken")
    num_steps: int = Field(default=500_000, ge=1, lt=2**31, description="training steps, each one update")
    batch_size: int = Field(default=256, ge=1, le=2**24, description="B, sequences of a training batch")
    eval_batch_size: int = Field(default=2048, ge=1, le=2**24, description="sequences on which the model is evaluated")
    matmul_precision: Literal["highest", "tf32x3", "tf32"] = Field(
        default="highest",
        description="of matrix products in training. highest: float32; tf32: factors rounded to 10 bits, several times as fast on a GPU's "
        "tensor cores; tf32x3: three such products, nearly float32. Elsewhere the roundings are imitated, slowly",
    )
    run_name: str | None = Field(default=None, description="the run's name; null: made from the settings")

    @property
    def name(self) -> str:
        """The run's name: sizes, seed, and a hash of every setting that decides the weights.

        The grids of checkpoints and logs are not part of it, because a run with more checkpoints is the same run.
        """
        if self.run_name is not None:
            return self.run_name
        decisive = self.decisive(*self.decides)
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
        seed = "none" if self.task_config.seed is None else self.task_config.seed
        return f"{self.task_config.label}-seed{seed}-{digest}"

    @field_validator("run_name")
    @classmethod
    def _names_one_folder(cls, value: str | None) -> str | None:
        # The longest name made from a run's name is that of its estimates.
        if value is not None and ("/" in value or not is_key(f"llc-{value}-00000000") or not is_key(value)):
            raise ValueError(
                "a run's name is also its folder's name: it may hold letters, digits and _ . , = + @ -, must begin with a "
                f"letter, a digit or _, and may have at most {MAX_SEGMENT_LENGTH - 13} characters"
            )
        return value

    def identity(self) -> dict[str, Any]:
        """Plain data of the settings that decide the weights, including derived seeds."""
        task = self.task_config if self.task_config.seed is None else self.task_config.resolved()
        return {**super().identity(), "task_config": task.model_dump(mode="json")}

    def resolved(self) -> Self:
        """A copy in which all seeds are numbers. A drawn model seed becomes part of the name."""
        return self.model_copy(update={"task_config": self.task_config.resolved(), "run_name": self._resolved_name()})

    def with_kept_seed(self, stored: Mapping[str, Any] | None) -> Self:
        """A copy in which a null model seed is replaced by the one that was drawn for the `stored` run."""
        if stored is None or "task_config" not in stored or self.task_config.seed is not None:
            return self
        seed = type(self).parse({"task_config": stored["task_config"]}).task_config.seed
        return self.model_copy(update={"task_config": self.task_config.model_copy(update={"model_seed": seed})})

    def without_derived_seeds(self) -> Self:
        """A copy in which seeds that equal the derived ones are null. What is left tells this run from others."""
        bare = self.task_config.model_copy(update=dict.fromkeys(self.task_config.derived))
        follows = self.task_config.seed is not None and bare.resolved() == self.task_config
        return self.model_copy(update={"task_config": bare}) if follows else self

    def _resolved_name(self) -> str | None:
        return self.name if self.task_config.seed is not None else self.run_name

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step` (from 0).

        Piecewise linear (or cosine) through three points, with T = total_steps and p = pct_start:
        η(0) = max_lr/div, η(pT - 1) = max_lr, η(T - 1) = max_lr/(div·final_div). It equals
        torch.optim.lr_scheduler.OneCycleLR.
        """
        schedule, peak = self.scheduler_config, self.scheduler_config.max_lr or self.optimizer_config.lr
        if schedule.scheduler_type == "constant":
            return self.optimizer_config.lr
        total = schedule.total_steps or self.num_steps
        default = max(total / 2 - 1, 1.0)
        low = peak / (schedule.div_factor or default)
        final = low / (schedule.final_div_factor or default)
        top = schedule.pct_start * total - 1
        if step <= top:
            return _anneal(schedule.anneal_strategy, low, peak, step / top if top > 0 else 1.0)
        return _anneal(schedule.anneal_strategy, peak, final, min((step - top) / (total - 1 - top), 1.0))

    def checkpoint_steps(self) -> list[int]:
        """The steps whose checkpoints are written: the grid and the last step."""
        grid = expand_steps(self.checkpointer_config.checkpoint_steps, self.num_steps)
        return sorted({*grid, self.num_steps - 1})

    def logging_steps(self) -> list[int]:
        """The steps at which metrics are evaluated: the grid and the last step."""
        grid = expand_steps(self.logger_config.logging_steps, self.num_steps)
        return sorted({*grid, self.num_steps - 1})


class TrainingConfig(Training[TaskConfig]):
    """One training run of in-context linear regression. Defaults are the reference code's."""

    task_config: TaskConfig = Field(default=TaskConfig(), description="the task and the model")


def _anneal(strategy: str, start: float, end: float, fraction: float) -> float:
    if strategy == "cos":
        return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
    return start + (end - start) * fraction
