"""One step of training for many seeds at once, on an accelerator, without waiting for the host.

Parameters, moments and batches have one more leading axis, the members (seeds). Everything that a step needs is on the
device. The data come from the counter-based random streams. They are made for many steps at a time, because the generator
takes some hundred small operations, however many numbers it makes. The learning rates come from a table, and the losses go
to a buffer. So the host launches a block of steps without waiting for it:

- cuda: one step is captured as a CUDA graph and replayed. A side stream makes the data of later steps meanwhile.
- xla: one step is one compiled graph, and making data is another. They are traced again each time and found in the cache.
  Step numbers are tensors, so that no number becomes part of a graph.
- elsewhere (cpu, mps): the same operations, one by one.

A member sees the data of its solo run bit for bit. Its losses agree with the solo run to the rounding of batched
arithmetic.

Shapes: E members, S steps, B batch, K examples, D task dimension, M tasks, P parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from icl.config import TrainingConfig
from icl.devices import end_of_graph, same_graph_each_step
from icl.engine import choose_batched
from icl.engine.capture import captured, warm_up
from icl.evals import make_evaluator
from icl.model import unflatten
from icl.tasks import BLOCK, EnsembleBatches
from icl.training.kinds import initial_flat
from icl.training.optimizers import FlatOptimizer, Rates, rates_at
from icl.training.standing import data_stream


class AcceleratorStepper:
    """The state of E members on the device, and the step that advances it in place; see `icl.training.stepper.Stepper`.

    Args:
        configs: settings of the members, with resolved seeds. They differ only in their seeds.
        step: number of the first step to do.
        states: the tensors of each member's saved state; empty for a fresh start.
        device: the device to compute on.
        capture: whether a step is replayed as one graph on cuda. Otherwise its operations are launched one by one.
    """

    block = BLOCK

    def __init__(
        self,
        configs: Sequence[TrainingConfig],
        step: int,
        states: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        capture: bool = True,
    ) -> None:
        config = configs[0]
        self._capture = capture and device.type == "cuda"
        self._configs, self._shape, self._device = configs, config.task_config.shape, device
        self.engine, self._loss_and_grad = choose_batched(self._shape, device, config.matmul_precision)
        # Metrics are computed on the host, because a lazy device would compile another graph for them in every block.
        self._evaluated_on = torch.device("cpu") if device.type == "xla" else device
        streams = [data_stream(each) for each in configs]
        laws = [each.task_config.pretrain_task() for each in configs]
        self._batches = EnsembleBatches(laws, streams, config.batch_size, device)
        flats = [initial_flat(each, state) for each, state in zip(configs, states, strict=True)]
        self.flats = torch.stack(flats).to(device, copy=True)
        self._optimizer = FlatOptimizer(config.optimizer_config, self.flats, _stacked(states), fused=False)
        self.step = self._first = step
        self._step = torch.tensor([step], device=device)
        rates = [rates_at(config, number) for number in range(step, config.num_steps)]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self._losses = torch.zeros(BLOCK, len(configs), device=device)
        self._ahead = torch.arange(self._batches.steps_at_once, device=device)
        self._data: tuple[Tensor, Tensor] | None = None
        self._made = step
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._fetched: tuple[Tensor, Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        end_of_graph(device)  # so that the zeros above become data and not constants in the first step's graph

    def run(self, count: int) -> Tensor:
        """Do `count` <= BLOCK steps; returns their batch losses (count, E) on the host. Only this last copy waits."""
        assert 1 <= count <= BLOCK
        slots = torch.arange(self.step - self._first, self.step - self._first + count) % BLOCK
        with same_graph_each_step(self._device):
            for _ in range(count):
                if self._data is None or self.step == self._made + len(self._ahead):
                    self._make_data()
                self._launch()
                self.step += 1
        return self._losses.cpu()[slots]

    def weights(self) -> list[dict[str, Tensor]]:
        """The members' weights."""
        return [unflatten(self._shape, flat) for flat in self.flats.cpu()]

    def evaluate(self) -> list[Mapping[str, float]]:
        """The metrics of `icl.evals.make_evaluator`."""
        flats = self.flats.to(self._evaluated_on)
        return [of(unflatten(self._shape, flat)) for of, flat in zip(self._evaluators, flats, strict=True)]

    @cached_property
    def _evaluators(self) -> list[Callable[[Mapping[str, Tensor]], dict[str, float]]]:
        return [make_evaluator(config, self._evaluated_on) for config in self._configs]

    def states(self) -> list[dict[str, Tensor]]:
        """Parameters and optimiser state of each member, on the host."""
        own = {"flat": self.flats.cpu(), **self._optimizer.state(self.step)}
        return [
            {name: value[member].clone() if value.ndim else value for name, value in own.items()}
            for member in range(len(self.flats))
        ]

    @torch.no_grad()
    def _make_data(self) -> None:
        """Write the batches of the next steps into memory with a fixed address, from which a captured step reads."""
        xs, ys = self._batches(self._step + self._ahead) if self._fetched is None else self._arrived(self._fetched)
        if self._data is None:
            self._data = (
                xs.clone(memory_format=torch.contiguous_format),
                ys.clone(memory_format=torch.contiguous_format),
            )
        else:
            self._data[0].copy_(xs)
            self._data[1].copy_(ys)
        self._made = self.step
        if self._side is not None:
            self._fetched = self._fetch(self._side)
        end_of_graph(self._device)

    def _fetch(self, side: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        """The batches after those, made on the side stream while the steps run."""
        main = torch.cuda.current_stream(self._device)
        first = self._step + len(self._ahead)  # read before the steps change it
        side.wait_stream(main)
        with torch.cuda.stream(side):
            ahead = self._batches(first + self._ahead)
        first.record_stream(side)
        return ahead

    def _arrived(self, fetched: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The batches that the side stream made, ready for the main stream."""
        assert self._side is not None
        main = torch.cuda.current_stream(self._device)
        main.wait_stream(self._side)
        for part in fetched:
            part.record_stream(main)  # so that its memory is not reused by the side stream before it is read
        return fetched

    def _launch(self) -> None:
        if self._capture:
            self._launch_captured()
        else:
            self._advance()
            end_of_graph(self._device)

    def _launch_captured(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        kept = [value.clone() for value in self._mutable()]
        warm_up(self._advance, self._device)
        for value, old in zip(self._mutable(), kept, strict=True):
            value.copy_(old)
        self._graph, _ = captured(self._advance, self._device)
        self._graph.replay()

    def _mutable(self) -> list[Tensor]:
        return [self.flats, self._step, self._losses, *self._optimizer.moments.values()]

    @torch.no_grad()
    def _advance(self) -> None:
        """One step, in place and without numbers from the host."""
        assert self._data is not None
        done = self._step - self._first
        xs, ys = (part.index_select(0, done % len(self._ahead))[0] for part in self._data)
        token_losses, gradients = self._loss_and_grad(self.flats, xs, ys, None)
        # The modulo keeps the row inside the table when a warm-up of the capture runs past its end.
        rates = self._rates.index_select(0, done % len(self._rates))[0]
        self._optimizer.update(gradients, Rates(*rates))
        self._losses.index_copy_(0, done % BLOCK, token_losses.mean(dim=-1)[None])
        self._step += 1


def _stacked(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The members' optimiser states, stacked along a first axis."""
    names = set(states[0]) - {"flat", "step"}
    return {name: torch.stack([state[name] for state in states]) for name in names}
