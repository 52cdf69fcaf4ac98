"""One step of training for many seeds at once, on an accelerator, without waiting for the host.

Parameters, moments and batches carry one more leading axis, the members (seeds). Everything a step needs is on the
device: data come from the counter-based streams there, many steps' at a time (the generator is some hundred small
operations, however many numbers they make), learning rates from a table, losses go to a buffer. A block of steps is
therefore only launched, never waited for:

- cuda: one step is captured as a CUDA graph and replayed;
- xla: one step is one compiled graph, and so is the making of data, traced again and found in the cache; step numbers
  are tensors, so that no number is compiled in;
- elsewhere (cpu, mps): the same operations, one by one.

A member sees the data of its solo run bit for bit; its losses agree to the rounding of batched arithmetic.

Shapes: E members, S steps, B batch, K examples, D task dimension, M tasks, P parameters.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from icl.config import OptimizerConfig, TrainingConfig
from icl.devices import end_of_graph, same_graph_each_step
from icl.engine import batched_loss_and_grad
from icl.model import TransformerShape
from icl.optimizers import STATE_NAMES
from icl.streams import Stream, keys_of, normals, scaled_down, threefry2x32
from icl.tasks import RegressionTask

BLOCK = 1000
"""Most steps between two looks at the losses."""

_WARM_UP = 3  # steps that run before a capture, as CUDA graphs ask for
_DATA_NUMBERS = 2**24
"""Most numbers of data made at a time: 64 MB."""


class BatchSource:
    """Batches of all members at several steps: xs (S, E, B, K, D) and ys (S, E, B, K, 1).

    At each step member e gets the numbers of `laws[e].sample(streams[e], step, batch_size)`.

    Raises:
        ValueError: laws that differ in more than their tasks.
    """

    def __init__(
        self, laws: Sequence[RegressionTask], streams: Sequence[Stream], batch_size: int, device: torch.device
    ) -> None:
        first = laws[0]
        kinds = {(law.task_size, law.max_examples, law.noise_variance, law.num_tasks) for law in laws}
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
        return xs, (xs * tasks[..., None, :]).sum(dim=-1, keepdim=True) + errors

    def _chosen_tasks(self, tasks: Tensor, steps: Tensor) -> Tensor:
        """(S, E, B, D) out of tasks (E, M, D)."""
        keys, batch = self._keys["task-index"][:, :, None], self._size[0]
        counter = torch.arange((batch + 1) // 2, dtype=torch.int32, device=keys.device)
        words = threefry2x32(keys[:, 0], keys[:, 1], steps.to(torch.int32)[:, None, None], counter)
        unsigned = torch.stack(words, dim=-1).flatten(2)[..., :batch].to(torch.int64) & 0xFFFFFFFF
        index = scaled_down(unsigned, tasks.shape[1])
        members = torch.arange(len(tasks), device=keys.device)[:, None]
        return tasks[members, index]


class EnsembleStep:
    """The state of E members on the device, and the step that advances it in place.

    Args:
        shape: of the models.
        configs: of the members, with resolved seeds; they share everything but seeds.
        flats: initial parameters (E, P).
        step: number of the first step to do.
        moments: optimizer state by name, as `state()` gives it; empty for a fresh start.
        device: where to compute.
    """

    def __init__(
        self,
        shape: TransformerShape,
        configs: Sequence[TrainingConfig],
        streams: Sequence[Stream],
        flats: Tensor,
        step: int,
        moments: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        config = configs[0]
        self._shape, self._device, self._optimizer = shape, device, config.optimizer_config
        self._batches = BatchSource(
            [each.task_config.pretrain_task() for each in configs], streams, config.batch_size, device
        )
        self.flats = flats.detach().clone().to(device)
        self._moments = {
            name: moments[name].clone().to(device) if name in moments else torch.zeros_like(self.flats)
            for name in STATE_NAMES[self._optimizer.optimizer_type]
            if name != "step"
        }
        self.step = step
        self._step = torch.tensor([step], device=device)
        self._first = step
        rates = [_rates(config, number) for number in range(step, config.num_steps)]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self._losses = torch.zeros(BLOCK, len(configs), device=device)
        self._ahead = torch.arange(self._batches.steps_at_once, device=device)
        self._data: tuple[Tensor, Tensor] | None = None
        self._made = step
        self._graph: torch.cuda.CUDAGraph | None = None
        end_of_graph(device)  # so that the zeros above are data, not constants of the first step's graph

    def run(self, count: int) -> Tensor:
        """Do `count` <= BLOCK steps; returns their batch losses (count, E) on the host, the only wait of the block."""
        assert 1 <= count <= BLOCK
        slots = torch.arange(self.step - self._first, self.step - self._first + count) % BLOCK
        with same_graph_each_step(self._device):
            for _ in range(count):
                if self._data is None or self.step == self._made + len(self._ahead):
                    self._make_data()
                self._launch()
                self.step += 1
        return self._losses.cpu()[slots]

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state on the host, members along the first axis: "flat" and the names of `FlatOptimizer.state`."""
        state = {"flat": self.flats, **self._moments}
        count = (
            {"step": torch.tensor(float(self.step))} if "step" in STATE_NAMES[self._optimizer.optimizer_type] else {}
        )
        return {name: value.cpu().clone() for name, value in state.items()} | count

    @torch.no_grad()
    def _make_data(self) -> None:
        """The batches of the steps from here on, into memory that stays where it is: a captured step reads it there."""
        xs, ys = self._batches(self._step + self._ahead)
        if self._data is None:
            self._data = xs.contiguous(), ys.contiguous()
        else:
            self._data[0].copy_(xs)
            self._data[1].copy_(ys)
        self._made = self.step
        end_of_graph(self._device)

    def _launch(self) -> None:
        if self._device.type == "cuda":
            self._launch_captured()
        else:
            self._advance()
            end_of_graph(self._device)

    def _launch_captured(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        kept = [value.clone() for value in self._mutable()]
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._advance()
        torch.cuda.current_stream(self._device).wait_stream(side)
        for value, old in zip(self._mutable(), kept, strict=True):
            value.copy_(old)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._advance()
        self._graph.replay()

    def _mutable(self) -> list[Tensor]:
        return [self.flats, self._step, self._losses, *self._moments.values()]

    @torch.no_grad()
    def _advance(self) -> None:
        """One step, all in place and without a number from the host."""
        assert self._data is not None
        done = self._step - self._first
        xs, ys = (part.index_select(0, done % len(self._ahead))[0] for part in self._data)
        token_losses, gradients = batched_loss_and_grad(self._shape, self.flats, xs, ys)
        # The modulo keeps the row inside the table when a warm-up of the capture runs past its end.
        rates = self._rates.index_select(0, done % len(self._rates))[0]
        _update(self._optimizer, self.flats, self._moments, gradients, rates)
        self._losses.index_copy_(0, done % BLOCK, token_losses.mean(dim=-1)[None])
        self._step += 1


def _rates(config: TrainingConfig, step: int) -> tuple[float, float, float]:
    """Learning rate, Adam's step size η / (1 - β₁ᵗ) and its √(1 - β₂ᵗ), t = step + 1, in double precision: 1 - β₂ᵗ cancels in float32."""
    rate, (beta1, beta2), time = config.learning_rate(step), config.optimizer_config.betas, step + 1
    return rate, rate / (1 - beta1**time), (1 - beta2**time) ** 0.5


def _update(
    config: OptimizerConfig, flats: Tensor, moments: Mapping[str, Tensor], gradients: Tensor, rates: Tensor
) -> None:
    """One update of torch.optim's Adam, AdamW or SGD, with rates from `_rates` on the device."""
    rate, step_size, correction = rates
    if config.optimizer_type == "AdamW":
        flats.mul_(1 - rate * config.weight_decay)
    elif config.weight_decay:
        gradients = gradients + config.weight_decay * flats
    if config.optimizer_type == "SGD":
        buffer = moments["momentum_buffer"].mul_(config.momentum or 0.0).add_(gradients)
        flats.sub_(rate * buffer)
        return
    beta1, beta2 = config.betas
    mean = moments["exp_avg"].mul_(beta1).add_(gradients, alpha=1 - beta1)
    square = moments["exp_avg_sq"].mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    flats.sub_(step_size * mean / (square.sqrt() / correction + config.eps))
