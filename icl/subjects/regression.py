"""The regression run as a subject: the library's transformer along its own training run, and its sampling data.

Shapes: B batch, K examples, D task dimension, n samples of the evaluation set.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from icl.config import TrainingConfig
from icl.engine import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import Inputs, SamplerConfig
from icl.streams import Stream
from icl.tasks import EnsembleBatches, RegressionTask, zero_predictor_loss

Batch = tuple[Tensor, Tensor]
TaskLaw = Literal["pretrain", "true"]
"""The tasks of the training data, or those of the law that they were drawn from: Gaussian."""


class Weights(Protocol):
    """Weights by step, such as `icl.checkpoints.Checkpoints`."""

    def steps(self) -> list[int]: ...

    def load(self, step: int) -> Mapping[str, Tensor]: ...


class HeldWeights:
    """Weights at hand, at the steps 0, 1, ..."""

    def __init__(self, weights: Sequence[Mapping[str, Tensor]]) -> None:
        self._weights = weights

    def steps(self) -> list[int]:
        return list(range(len(self._weights)))

    def load(self, step: int) -> Mapping[str, Tensor]:
        return self._weights[step]


class RegressionRun:
    """A training run of this library.

    Args:
        training: its settings.
        weights: its checkpoints.
        grad_tasks, eval_tasks: the tasks of the data that drive the chains, and of those that draws are evaluated on; None: the same. With
            another law than the training's this is a data-refined learning coefficient (arXiv 2410.02984).
    """

    reads_ahead = True
    loss = staticmethod(mse_loss)

    def __init__(
        self,
        training: TrainingConfig,
        weights: Weights,
        grad_tasks: TaskLaw = "pretrain",
        eval_tasks: TaskLaw | None = None,
    ) -> None:
        self.training = training
        self._weights = weights
        self._grad_tasks: TaskLaw = grad_tasks
        self._eval_tasks: TaskLaw = grad_tasks if eval_tasks is None else eval_tasks

    def steps(self) -> list[int]:
        """Ascending."""
        return self._weights.steps()

    def model(self, step: int) -> InContextRegressionTransformer:
        """Raises:
        CheckpointError, StorageError: the checkpoint cannot be read.
        """
        return InContextRegressionTransformer.from_weights(self.training.task_config.shape, self._weights.load(step))

    def batches(self, step: int) -> Callable[[int], Batch]:
        """Those of the default sampler with seed 0."""
        return sampling_batches(tasks_of(self.training, self._grad_tasks), SamplerConfig(), 0)[0]

    def sampling_inputs(self, step: int, sampler: SamplerConfig, device: torch.device | str = "cpu") -> Inputs:
        """The data that the sampler's settings ask for, the same at every checkpoint; `init_seed` is given."""
        assert sampler.init_seed is not None, "the seed is drawn before the data are made"
        driving, evaluated = (tasks_of(self.training, law) for law in (self._grad_tasks, self._eval_tasks))
        batches, eval_batches = sampling_batches(driving, sampler, sampler.init_seed, device)
        if self._eval_tasks != self._grad_tasks:
            eval_batches = sampling_batches(evaluated, sampler, sampler.init_seed, device)[1]
        return Inputs(batches, eval_batches, zero_predictor_loss(evaluated))


def tasks_of(training: TrainingConfig, law: TaskLaw) -> RegressionTask:
    """The distribution of sequences that goes by this name for a training run."""
    config = training.task_config.resolved()
    return config.pretrain_task() if law == "pretrain" else config.true_task()


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
        self._source = EnsembleBatches([task], [stream], size, device)
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
        self.num_samples, self.per_pass = len(self._xs), len(self._xs) // self._batch_size
        self._pass = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Batch:
        epoch, index = divmod(step, self.per_pass)
        # One tuple, replaced at once: worker threads in different passes each read a matching pair.
        current = self._pass
        if current[0] != epoch:
            current = self._pass = epoch, self._stream.uniform(epoch, (len(self._xs),)).argsort().to(self._place)
        chosen = current[1][index * self._batch_size : (index + 1) * self._batch_size].to(self._xs.device)
        return self._xs[chosen], self._ys[chosen]
