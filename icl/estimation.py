"""The learning coefficient along a training run: one estimate per checkpoint, from the sweep files' settings.

Shapes: B batch, K examples, D task dimension, n samples of the evaluation set.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from icl.checkpoints import Checkpoints
from icl.config import StepGrid, TrainingConfig, expand_steps, nearest_step
from icl.ensemble import BatchSource
from icl.evals import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import LLCResult, SamplerConfig, can_share_a_batch, estimate_llc, estimate_llcs
from icl.sampling.chains import chains_that_fit
from icl.sampling.config import EvalMetric
from icl.sampling.llc import TRACE_BYTES
from icl.sampling.transformer_objective import make_objective
from icl.settings import ConfigError, Settings
from icl.streams import Stream
from icl.tasks import RegressionTask

Batch = tuple[Tensor, Tensor]

AT_ONCE = 16
"""Most checkpoints whose chains share a batch: what a run that is stopped loses."""


class PlottingConfig(Settings):
    """Figures drawn of each estimate."""

    include_loss_trace: bool = False
    include_weights_pca: bool = False
    num_components: int = Field(default=3, ge=2)
    num_points: int = Field(
        default=10, ge=2, description="grid points per axis of the loss landscape behind the weight PCA"
    )


class LLCConfig(TrainingConfig):
    """A training run's settings, which find its checkpoints, and how to sample at which of them.

    At most one of `steps` (a grid), `step` (one) and `checkpoint_idx` (an index into the sorted checkpoints) is given;
    none means every
    checkpoint, as in the reference code. Steps without a checkpoint are replaced by the nearest step that has one.
    """

    sampler_config: SamplerConfig = SamplerConfig()
    steps: StepGrid = None
    step: int | None = Field(default=None, ge=0)
    checkpoint_idx: int | None = None
    plotting_config: PlottingConfig = PlottingConfig()
    testing: bool = Field(default=False, description="sample at the first and last step only")

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
    def training(self) -> TrainingConfig:
        """The settings of the training run alone."""
        return TrainingConfig.model_validate(self.model_dump(include=set(TrainingConfig.model_fields)))

    @property
    def llc_name(self) -> str:
        """The name of this estimate: the training run's, and a hash of the sampler's settings and the choice of
        steps."""
        decisive = self.model_dump(
            mode="json", include={"sampler_config", "steps", "step", "checkpoint_idx", "testing"}
        )
        sampler = decisive["sampler_config"]
        # The names of results outlive defaults.
        sampler["max_memory_bytes"] = sampler["max_memory_bytes"] or TRACE_BYTES
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
        return f"llc-{self.name}-{digest}"

    def chosen_steps(self, present: Sequence[int]) -> list[int]:
        """The checkpoints to sample at, out of those present (sorted).

        Raises:
            ConfigError: there is none, `checkpoint_idx` is outside their range, or the run has not been trained as far as
            the choice reaches.
        """
        if not present:
            raise ConfigError(f"the run {self.name} has no checkpoints; train it first with the same settings")
        if self.step is not None:
            chosen = self._nearest([self.step], present)
        elif self.checkpoint_idx is not None:
            if not -len(present) <= self.checkpoint_idx < len(present):
                raise ConfigError(
                    f"checkpoint_idx={self.checkpoint_idx} is out of range: the run has {len(present)} checkpoints"
                )
            chosen = [present[self.checkpoint_idx]]
        elif self.steps is not None:
            chosen = self._nearest(expand_steps(self.steps, self.num_steps), present)
        else:
            chosen = list(present)
        return [chosen[0], chosen[-1]][: len(chosen)] if self.testing else chosen

    def _nearest(self, wanted: Sequence[int], present: Sequence[int]) -> list[int]:
        """The present checkpoints nearest to those wanted."""
        if not wanted:
            raise ConfigError("steps chooses no step; leave it out for every checkpoint")
        last = min(max(wanted), self.num_steps - 1)
        if last > present[-1]:
            raise ConfigError(
                f"step {last} is chosen, but {self.name} has checkpoints up to step {present[-1]} only; train it on, or choose "
                "earlier steps"
            )
        return sorted({nearest_step(present, step) for step in wanted})


def sampling_batches(
    task: RegressionTask, sampler: SamplerConfig, seed: int, device: torch.device | str = "cpu"
) -> tuple[Callable[[int], Batch], Callable[[int], Batch] | Sequence[Batch] | None]:
    """The gradient's batches (step -> batch), and what `eval_method` evaluates on: the evaluation set in batches, fresh
    batches (index -> batch), or None for the gradient's own.

    "infinite-dataset" gives a fresh batch at every step; "eval-dataset" a fixed set of n = eval_dataset_size
    sequences, shuffled anew at every
    pass. All are functions of the seed.
    """
    stream = Stream(seed, "sampling")
    fixed = sampler.grad_batch_origin == "eval-dataset"
    eval_batch_size = sampler.eval_batch_size or sampler.grad_batch_size
    needs_set = fixed or sampler.eval_method in ("dataset", "fixed-minibatch")
    dataset = task.sample(stream.child("dataset"), 0, sampler.eval_dataset_size, device) if needs_set else None
    eval_batches = None
    if dataset is not None and sampler.eval_method != "grad-minibatch":
        eval_batches = list(zip(*(part.split(eval_batch_size) for part in dataset), strict=True))
    elif sampler.eval_method == "new-minibatch":
        eval_batches = partial(task.sample, stream.child("evaluation"), batch_size=eval_batch_size, device=device)
    if not fixed:
        return _fresh_batches(
            task, stream.child("batches"), sampler.grad_batch_size, torch.device(device)
        ), eval_batches
    assert dataset is not None
    return _Shuffled(dataset, sampler.grad_batch_size, stream.child("order")), eval_batches


def _fresh_batches(task: RegressionTask, stream: Stream, size: int, device: torch.device) -> Callable[[int], Batch]:
    if device.type in ("cpu", "xla"):  # a lazy device would compile a batch's place among others into its graph
        return partial(task.sample, stream, batch_size=size, device=device)
    return MadeAhead(task, stream, size, device)


class MadeAhead:
    """Step -> the batch of `RegressionTask.sample`, made on an accelerator for many steps at a time: the generator is some hundred
    small operations, however many numbers they make."""

    def __init__(self, task: RegressionTask, stream: Stream, size: int, device: torch.device) -> None:
        self._source = BatchSource([task], [stream], size, device)
        self._ahead = torch.arange(self._source.steps_at_once, device=device)
        self._made: tuple[int, Batch] | None = None

    def __call__(self, step: int) -> Batch:
        first = step - step % len(self._ahead)
        made = self._made
        if made is None or made[0] != first:
            made = self._made = first, self._source(first + self._ahead)
        xs, ys = made[1]
        return xs[step - first, 0], ys[step - first, 0]


class _Shuffled:
    """Step -> batch of a fixed data set in an order drawn anew at every pass; the last incomplete batch of a pass is
    left out.

    The order is made on the host, for devices sort ties differently, and numbers of 24 bits have some; it is copied to the device once
    for a pass. A lazy device (xla), to which a place in it would be another graph, gets it batch by batch.
    """

    def __init__(self, dataset: Batch, batch_size: int, stream: Stream) -> None:
        self._xs, self._ys = dataset
        self._place = torch.device("cpu") if self._xs.device.type == "xla" else self._xs.device
        self._batch_size = min(batch_size, len(self._xs))
        self._stream = stream
        self._pass = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Batch:
        per_epoch = len(self._xs) // self._batch_size
        epoch, index = divmod(step, per_epoch)
        # One tuple, replaced at once: worker threads in different passes each read a matching pair.
        current = self._pass
        if current[0] != epoch:
            current = self._pass = epoch, self._stream.uniform(epoch, (len(self._xs),)).argsort().to(self._place)
        chosen = current[1][index * self._batch_size : (index + 1) * self._batch_size].to(self._xs.device)
        return self._xs[chosen], self._ys[chosen]


def zero_predictor_loss(task: RegressionTask) -> float:
    """E[y²] = E‖w‖² + σ²: the loss of predicting 0, which no useful model exceeds."""
    energy = task.task_size if task.num_tasks is None else float((task.tasks**2).sum(dim=1).mean())
    return energy + task.noise_variance


def model_at(
    config: TrainingConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> InContextRegressionTransformer:
    """The run's model with the given weights."""
    model = InContextRegressionTransformer.from_shape(config.task_config.shape, seed=0)
    model.load_state_dict(dict(weights))
    return model.to(device)


def estimate_at_checkpoint(
    config: LLCConfig,
    weights: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LLCResult:
    """One estimate at the given weights, with data and chains made from `sampler_config.init_seed` (drawn if null)."""
    return next(estimate_at_checkpoints(config, [weights], device, progress))


def estimate_at_checkpoints(
    config: LLCConfig,
    weights: Sequence[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LLCResult]:
    """`estimate_at_checkpoint` at each of several checkpoints; the chains of more than one run as one batch.

    Raises:
        ValueError: settings that do not allow that (`icl.sampling.can_share_a_batch`).
    """
    task = config.task_config.resolved().pretrain_task()
    sampler = config.sampler_config
    seed = secrets.randbelow(2**31) if sampler.init_seed is None else sampler.init_seed
    sampler = sampler.model_copy(update={"init_seed": seed, "eval_metrics": config.metrics})
    batches, eval_batches = sampling_batches(task, sampler, seed, device)
    models = [model_at(config, each, device) for each in weights]
    about = {"eval_batches": eval_batches, "reference_loss": zero_predictor_loss(task), "progress": progress}
    if len(models) == 1:
        yield estimate_llc(models[0], mse_loss, batches, sampler, **about)
    else:
        yield from estimate_llcs(models, mse_loss, batches, sampler, **about)


def hessian_at_checkpoint(
    config: LLCConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """`hessian/evals/i` for the `num_evals` largest eigenvalues of the loss Hessian, and `hessian/trace`, on fixed
    data.

    The loss is that of the first `eval_batch_size` (default `grad_batch_size`) sequences of the evaluation set.
    """
    from icl.analysis.hessian import hessian_table

    sampler = config.sampler_config
    task = config.task_config.resolved().pretrain_task()
    size = sampler.eval_batch_size or sampler.grad_batch_size
    xs, ys = task.sample(Stream(sampler.init_seed or 0, "sampling").child("dataset"), 0, size, device)
    table = hessian_table(model_at(config, weights, device), xs, ys, sampler.num_evals)
    return {str(name): float(table[name].iloc[0]) for name in table.columns}


def checkpoints_at_once(config: LLCConfig, device: torch.device | str) -> int:
    """How many checkpoints' chains run as one batch: as many as fit the memory of an accelerator, where a launch for all costs little more
    than for one, and no more than AT_ONCE; one on a CPU, where chains of a single checkpoint fill the caches already, and where each
    checkpoint draws a seed of its own."""
    sampler = config.sampler_config.model_copy(update={"eval_metrics": config.metrics})
    if torch.device(device).type == "cpu" or sampler.init_seed is None or not can_share_a_batch(sampler):
        return 1
    task = config.task_config.resolved().pretrain_task()
    batch = task.sample(Stream(0, "sampling"), 0, sampler.grad_batch_size, device)
    model = InContextRegressionTransformer.from_shape(config.task_config.shape, seed=0).to(device)
    fitting = chains_that_fit(sampler, make_objective(model, mse_loss, sampler), batch)
    return min(AT_ONCE, max(1, fitting // sampler.num_chains))


class _Stopped(Exception):
    """Leaves an estimate that nobody waits for any more."""


def estimate_over_run(
    config: LLCConfig,
    checkpoints: Checkpoints,
    done: Sequence[int],
    record: Callable[[int, Mapping[str, Tensor], LLCResult], None],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Estimate at every chosen checkpoint that is not in `done`, recording each as it comes; returns how many are left
    undone. Checkpoints whose chains share a batch come together: a stop loses those under way.

    Args:
        record: called with each step, its weights and its estimate.
        progress: called with (sampling steps done, steps in all), over all checkpoints.
        should_stop: asked at each checkpoint and whenever `progress` is called; an estimate that it cuts short is not
        recorded.
    """
    todo = [step for step in config.chosen_steps(checkpoints.steps()) if step not in set(done)]
    size = checkpoints_at_once(config, device)
    groups = [todo[start : start + size] for start in range(0, len(todo), size)]
    start = 0
    for steps, weights in _read_ahead(checkpoints, groups):
        if should_stop():
            return len(todo) - start

        def report(now: int, total: int, start: int = start, share: int = len(steps)) -> None:
            if should_stop():
                raise _Stopped
            if progress is not None:
                progress(start * total + share * now, len(todo) * total)

        try:
            for step, each, result in zip(
                steps, weights, estimate_at_checkpoints(config, weights, device, report), strict=True
            ):
                record(step, each, result)
        except _Stopped:
            return len(todo) - start
        start += len(steps)
    return 0


def _read_ahead(
    checkpoints: Checkpoints, groups: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[Mapping[str, Tensor]]]]:
    """Each group's steps and weights; those of the next are read while one is sampled at.

    Raises:
        CheckpointError, StorageError: a checkpoint cannot be read; those before it have been given out.
    """

    def read(steps: Sequence[int]) -> tuple[list[Mapping[str, Tensor]], Exception | None]:
        weights: list[Mapping[str, Tensor]] = []
        try:
            for step in steps:
                weights.append(checkpoints.load(step))
        except Exception as error:
            return weights, error
        return weights, None

    reader = ThreadPoolExecutor(1)
    try:
        following = reader.submit(read, groups[0]) if groups else None
        for index, steps in enumerate(groups):
            assert following is not None
            weights, error = following.result()
            if error is None and index + 1 < len(groups):
                following = reader.submit(read, groups[index + 1])
            if weights:
                yield steps[: len(weights)], weights
            if error is not None:
                raise error
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
