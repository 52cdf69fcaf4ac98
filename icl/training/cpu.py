"""One step of training on a CPU: one member, one step at a time.

Shapes: B batch, K examples, P parameters.
"""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from icl.config import TrainingConfig
from icl.engine import Path
from icl.evals import make_evaluator
from icl.model import unflatten
from icl.training.kinds import initial_flat
from icl.training.optimizers import FlatOptimizer, rates_at
from icl.training.standing import data_stream


class CpuStepper:
    """The state of one member and the step that advances it in place; see `icl.training.stepper.Stepper`.

    Args:
        config: settings of the member, with resolved seeds.
        step: number of the first step to do.
        state: the tensors of a saved state; empty for a fresh start.
        path: how loss and gradient are computed.
    """

    block = 1

    def __init__(self, config: TrainingConfig, step: int, state: Mapping[str, Tensor], path: Path) -> None:
        self._config, self._path, self.step = config, path, step
        self.engine = path.name
        self._law, self._stream = config.task_config.pretrain_task(), data_stream(config)
        self._flat = initial_flat(config, state).clone()
        self._optimizer = FlatOptimizer(config.optimizer_config, self._flat, state)

    def run(self, count: int) -> Tensor:
        """Do `count` steps; returns their batch losses (count, 1). If a loss is not finite, the block ends before its update."""
        losses = torch.full((count, 1), torch.nan)
        for row in range(count):
            xs, ys = self._law.sample(self._stream, self.step, self._config.batch_size)
            token_losses, gradient = self._path.run(self._flat.detach(), xs, ys)
            losses[row] = loss = token_losses.mean()
            if not loss.isfinite():
                break
            self._optimizer.update(gradient, rates_at(self._config, self.step))
            self.step += 1
        return losses

    def weights(self) -> list[dict[str, Tensor]]:
        """Views of the member's weights."""
        return [unflatten(self._config.task_config.shape, self._flat.detach())]

    def evaluate(self) -> list[Mapping[str, float]]:
        """The metrics of `icl.evals.make_evaluator`."""
        return [self._evaluator(each) for each in self.weights()]

    @cached_property
    def _evaluator(self) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
        return make_evaluator(self._config, "cpu", self._path.predict)

    def states(self) -> list[dict[str, Tensor]]:
        """Parameters and optimiser state of the member."""
        return [{"flat": self._flat.detach(), **self._optimizer.state(self.step)}]
