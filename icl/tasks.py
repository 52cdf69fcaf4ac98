"""In-context linear regression: task distributions, sequences, tokens (arXiv 2402.02364, section 3.1; Raventós et al.,
arXiv 2306.15063).

Shapes: B batch, K examples, D task dimension, M tasks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from icl.streams import Stream, keys_of, normals, normals_of_streams, scaled_down, threefry2x32


@dataclass(frozen=True)
class RegressionTask:
    """The distribution of a sequence: w ~ task distribution, x_k ~ N(0, I_D), y_k = w·x_k + η_k with η_k ~ N(0, σ²).

    Attributes:
        task_size: D.
        max_examples: K.
        noise_variance: σ², a variance, not a standard deviation.
        num_tasks: M; None for Gaussian tasks w ~ N(0, I_D), otherwise w is uniform on a list of M vectors drawn from
            N(0, I_D).
        task_seed: the seed of that list. Lists are nested: task set M is the first M of one list, so that models
            trained on different M share their tasks (arXiv 2501.17745).
    """

    task_size: int
    max_examples: int
    noise_variance: float
    num_tasks: int | None = None
    task_seed: int = 0

    def __post_init__(self) -> None:
        if self.task_size < 1 or self.max_examples < 1:
            raise ValueError(
                f"task_size and max_examples must be at least 1, got {self.task_size}, {self.max_examples}"
            )
        if self.noise_variance < 0 or not math.isfinite(self.noise_variance):
            raise ValueError(f"noise_variance must be finite and at least 0, got {self.noise_variance}")
        if self.num_tasks is not None and self.num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, or None for Gaussian tasks, got {self.num_tasks}")

    @cached_property
    def tasks(self) -> Tensor:
        """The task list (M, D), float32.

        Raises:
            ValueError: the distribution is Gaussian and has no list.
        """
        if self.num_tasks is None:
            raise ValueError("Gaussian tasks have no task list; set num_tasks to an integer")
        return Stream(self.task_seed, "tasks").normal(0, (self.num_tasks, self.task_size))

    def sample(
        self, stream: Stream, step: int, batch_size: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Batch number `step` of a stream: xs (B, K, D) and ys (B, K, 1), float32, a pure function of the arguments."""
        if self.num_tasks is not None:
            return self.sequences(self.sample_tasks(stream, step, batch_size, device), stream, step)
        sizes = ((batch_size, self.task_size), *_sizes(batch_size, self.max_examples, self.task_size))
        streams = [stream.child(name) for name in ("tasks", "inputs", "noise")]
        tasks, xs, noise = normals_of_streams(streams, step, sizes, device)
        return xs, self.response(xs, tasks) + noise * math.sqrt(self.noise_variance)

    def sequences(self, tasks: Tensor, stream: Stream, step: int) -> tuple[Tensor, Tensor]:
        """Sequences for given tasks (B, D): xs (B, K, D) and ys (B, K, 1)."""
        streams = [stream.child("inputs"), stream.child("noise")]
        sizes = _sizes(len(tasks), self.max_examples, tasks.shape[1])
        xs, noise = normals_of_streams(streams, step, sizes, tasks.device)
        return xs, self.response(xs, tasks) + noise * math.sqrt(self.noise_variance)

    def response(self, xs: Tensor, tasks: Tensor) -> Tensor:
        """Labels without noise, w·x_k: xs (..., B, K, D), tasks (..., B, D) -> (..., B, K, 1). A new task overrides this."""
        return dot(xs, tasks)

    def sample_tasks(self, stream: Stream, step: int, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """The tasks (B, D) behind batch number `step` of the stream."""
        if self.num_tasks is None:
            return stream.child("tasks").normal(step, (batch_size, self.task_size), device)
        index = stream.child("task-index").integers(step, self.num_tasks, (batch_size,), device)
        return self.tasks.to(device)[index]


def dot(xs: Tensor, tasks: Tensor) -> Tensor:
    """w·x_k: xs (..., B, K, D), tasks (..., B, D) -> (..., B, K, 1)."""
    # A sum of products, not a matrix product: its bits do not depend on the batch it is part of.
    return (xs * tasks[..., None, :]).sum(dim=-1, keepdim=True)


def label(xs: Tensor, tasks: Tensor, errors: Tensor) -> Tensor:
    """Labels of the linear law, y_k = w·x_k + error_k, with errors (..., B, K, 1)."""
    return dot(xs, tasks) + errors


TASKS: Mapping[str, type[RegressionTask]] = {"linear": RegressionTask}
"""The distributions of sequences, by their names in the setting `task_type`. A new one is a subclass and a line here."""


def _sizes(batch_size: int, num_examples: int, task_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of inputs and noise."""
    return (batch_size, num_examples, task_size), (batch_size, num_examples, 1)


def encode_tokens(xs: Tensor, ys: Tensor) -> Tensor:
    """Interleave x_k -> [0, x_k] and y_k -> [y_k, 0..0]: (B, K, D), (B, K, 1) -> (B, 2K, D+1)."""
    x_tokens = torch.cat((torch.zeros_like(ys), xs), dim=-1)
    y_tokens = torch.cat((ys, torch.zeros_like(xs)), dim=-1)
    return torch.stack((x_tokens, y_tokens), dim=-2).flatten(-3, -2)


_DATA_NUMBERS = 2**24
"""Most numbers of data made at a time: 64 MB."""


class EnsembleBatches:
    """Batches of all members at several steps: xs (S, E, B, K, D) and ys (S, E, B, K, 1).

    At each step member e gets the numbers of `laws[e].sample(streams[e], step, batch_size)`.

    Raises:
        ValueError: laws that differ in more than their tasks.
    """

    def __init__(
        self, laws: Sequence[RegressionTask], streams: Sequence[Stream], batch_size: int, device: torch.device
    ) -> None:
        self._law = first = laws[0]
        kinds = {(type(law), law.task_size, law.max_examples, law.noise_variance, law.num_tasks) for law in laws}
        if len(kinds) > 1:
            raise ValueError("members of one batch must share task_size, max_examples, noise_variance and num_tasks")
        self._size = (batch_size, first.max_examples, first.task_size)
        self._noise_scale = first.noise_variance**0.5
        self._tasks = None if first.num_tasks is None else torch.stack([law.tasks for law in laws]).to(device)
        names = ("inputs", "noise", "tasks" if self._tasks is None else "task-index")
        self._keys = {name: keys_of([stream.child(name) for stream in streams], device) for name in names}
        self.steps_at_once = max(1, min(BLOCK, _DATA_NUMBERS // (len(laws) * math.prod(self._size))))

    def __call__(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """The batches at the given steps, an int64 tensor (S,) on the device."""
        batch, examples, task_size = self._size

        def normal(name: str, *size: int) -> Tensor:
            return normals(self._keys[name], steps, math.prod(size)).transpose(0, 1).unflatten(-1, size)

        tasks = normal("tasks", batch, task_size) if self._tasks is None else self._chosen_tasks(self._tasks, steps)
        xs = normal("inputs", batch, examples, task_size)
        errors = normal("noise", batch, examples, 1) * self._noise_scale
        return xs, self._law.response(xs, tasks) + errors

    def _chosen_tasks(self, tasks: Tensor, steps: Tensor) -> Tensor:
        """(S, E, B, D) out of tasks (E, M, D)."""
        keys, batch = self._keys["task-index"][:, :, None], self._size[0]
        counter = torch.arange((batch + 1) // 2, dtype=torch.int32, device=keys.device)
        words = threefry2x32(keys[:, 0], keys[:, 1], steps.to(torch.int32)[:, None, None], counter)
        unsigned = torch.stack(words, dim=-1).flatten(2)[..., :batch].to(torch.int64) & 0xFFFFFFFF
        index = scaled_down(unsigned, tasks.shape[1])
        members = torch.arange(len(tasks), device=keys.device)[:, None]
        return tasks[members, index]


def zero_predictor_loss(task: RegressionTask) -> float:
    """E[y²], the loss of predicting 0, which no useful model exceeds.

    With the linear response it is E‖w‖² + σ². With another one it is measured on 8,192 fixed sequences.
    """
    if type(task).response is not RegressionTask.response:
        _, ys = task.sample(Stream(0, "zero predictor"), 0, 8192)
        return float(ys.double().square().mean())
    energy = task.task_size if task.num_tasks is None else float((task.tasks**2).sum(dim=1).mean())
    return energy + task.noise_variance


BLOCK = 1000
"""Most steps between two looks at the losses."""
