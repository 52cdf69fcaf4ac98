"""What the chains of one run share: the plan, and each step's data and noise as functions of seed and step.

Shapes: E chains, P sampled parameters, T losses of one batch (tokens; 1 for a scalar loss).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from icl.devices import same_graph_each_step
from icl.sampling.config import SamplerConfig
from icl.sampling.control import AnchorGradients, MeanGradient, OfLastBatches
from icl.sampling.objective import Batch, Objective
from icl.sampling.pieces import WHOLE
from icl.sampling.supply import BatchSource, num_samples
from icl.streams import Stream

Recorder = Callable[[int, Tensor, Tensor], None]
"""(draw, positions (E, P), chain indices (E,)) -> None, called at every draw."""


class Evaluation:
    """The batches that a draw's loss is taken on, if these are not the gradient's batch.

    Args:
        batches: draw -> the batches whose losses are averaged.
        constant: whether the batches are the same at every draw. w* is then evaluated only once.
    """

    def __init__(self, batches: Callable[[int], Sequence[Batch]], constant: bool) -> None:
        self._batches = batches
        self._constant = constant
        self._anchor_losses: Tensor | None = None

    def losses(self, objective: Objective, draw: int, positions: Tensor) -> Tensor:
        """Mean losses (E, T) over the samples of the draw's batches."""
        total, count = positions.new_zeros(()), 0
        for batch in self._batches(draw):
            size = num_samples(batch)
            losses = objective.losses(positions, batch) * size
            total, count = losses if count == 0 else total + losses, count + size
        return total / count

    def anchor_losses(self, objective: Objective, draw: int, anchors: Tensor) -> Tensor:
        """Mean losses (C, T) of every w* over the draw's batches."""
        if self._anchor_losses is not None:
            return self._anchor_losses
        losses = self.losses(objective, draw, anchors)
        if self._constant:
            self._anchor_losses = losses
        return losses


class AnchorLosses(OfLastBatches):
    """Batch -> losses (C, T) of every w*. The last results are kept, so that data which never change cost one evaluation.

    Args:
        anchors: (C, P), several w* under one objective; None: the objective's own.
    """

    def __init__(self, objective: Objective, anchors: Tensor | None = None) -> None:
        self.anchors = objective.anchor[None] if anchors is None else anchors
        super().__init__(lambda batch: objective.losses(self.anchors, batch))


@dataclass(frozen=True)
class TestSchedule:
    """The draws at which the target is tested: one in every `stride` draws, at a random place within the stride.

    A fixed place would meet the same few batches of a cycle again and again.
    """

    stride: int
    seed: int

    def is_due(self, draw: int) -> bool:
        """Whether draw number `draw` is tested; a pure function."""
        stretch, place = divmod(draw, self.stride)
        return place == _drawn(self.seed, "test-places", stretch, self.stride)

    def partner(self, draw: int, step: int, cycle: int | None, stride: int = 1) -> int:
        """The step whose batch is the second batch of a test.

        Usually it is the next independent step. If the batches are a cycle, it is a random step of the cycle, and this step itself is
        possible. Two batches that can never coincide are not independent: if two batches make up the data, their errors are opposite.
        """
        return step + stride if cycle is None else _drawn(self.seed, "test-partners", draw, cycle)


@lru_cache(maxsize=64)
def _drawn(seed: int, purpose: str, step: int, high: int) -> int:
    """A number in [0, high). It is asked for at every draw of a stretch, and costs as much as a step of a small model."""
    return int(Stream(seed, purpose).integers(step, high, (1,)))


@dataclass(frozen=True)
class Plan:
    """All that one group of chains needs besides its seeds.

    Attributes:
        batches: step -> batch; (step, seed) -> batch if chains see independent batches.
        evaluation: the batches that a draw's loss is taken on; None: the gradient's batch, at the weights before the update.
        init_losses: (C, T) losses of every w*, if they are taken once; None: they are taken on the batch of every draw.
        init_errors: number of draws -> the standard errors (C,) of λ̂ because L(w*) is taken once; None: it is not.
        constant: whether every step uses the same batch.
        cycle: length of the cycle, if the batches are used in turn; None if they are not, or if this is unknown.
        stride: steps after which a batch is independent of this one.
        anchor_gradients, mean: the gradients of w* on batches, and their mean ḡ (`icl.sampling.control`).
        control: whether the chains use the gradient with its control variate.
        tests: the draws at which the target is tested (`icl.sampling.stein`); None: no draw.
    """

    config: SamplerConfig
    objective: Objective
    batches: BatchSource
    anchor_losses: AnchorLosses
    evaluation: Evaluation | None = None
    init_losses: Tensor | None = None
    init_errors: Callable[[int], Tensor] | None = None
    recorders: tuple[Recorder, ...] = ()
    constant: bool = False
    cycle: int | None = None
    stride: int = 1
    anchor_gradients: AnchorGradients | None = None
    mean: MeanGradient | None = None
    control: bool = False
    tests: TestSchedule | None = None

    @property
    def anchors(self) -> Tensor:
        """(C, P): the w* of the models that are sampled; one, unless several share the batch."""
        return self.anchor_losses.anchors

    def init_error(self, draws: int, place: int = 0) -> float:
        """The standard error of one model's λ̂ because L(w*) is not taken on the batches of the draws; 0 if it is."""
        return 0.0 if self.init_errors is None else float(self.init_errors(draws)[place])


class StepData:
    """The batches of one step: one for all chains, or one for each.

    Args:
        owners: (E,) the index of the w* that each chain started from; None: there is one w*.
    """

    def __init__(self, plan: Plan, step: int, seeds: Sequence[int], owners: Tensor | None = None) -> None:
        self._plan = plan
        self._chains = len(seeds)
        self._owners = owners
        self._at_anchor: list[Tensor] | None = None
        independent = plan.config.independent_batches
        self._batches = [plan.batches(step, seed) for seed in seeds] if independent else [plan.batches(step)]

    def of_chain(self, chain: int) -> "StepData":
        """The data of one chain."""
        own = copy.copy(self)
        own._chains = 1
        own._at_anchor = None
        own._batches = self._batches if len(self._batches) == 1 else [self._batches[chain]]
        own._owners = None if self._owners is None else self._owners[chain : chain + 1]
        return own

    def losses_and_gradients(
        self, positions: Tensor, token_weights: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, T) and gradients (E, P); see `Objective` for `out`."""
        objective = self._plan.objective
        with same_graph_each_step(positions.device):
            if len(self._batches) == 1:
                return objective.losses_and_gradients(positions, self._batches[0], token_weights, out)
            pairs = [
                objective.losses_and_gradients(position[None], batch, token_weights)
                for position, batch in zip(positions, self._batches, strict=True)
            ]
        return torch.cat([loss for loss, _ in pairs]), torch.cat([gradient for _, gradient in pairs])

    def anchor_losses(self) -> Tensor:
        """Losses (E, T) of w* on this step's data."""
        return self.of_each_chain(torch.cat([self._plan.anchor_losses(batch) for batch in self._batches]))

    def anchor_losses_of_draw(self, draw: int) -> Tensor:
        """Losses (E, T) of w*: those of the plan, or those on the batches of the draw's loss."""
        if self._plan.init_losses is not None:
            return self.of_each_chain(self._plan.init_losses)
        if self._plan.evaluation is not None:
            anchors = self._plan.anchors
            return self.of_each_chain(self._plan.evaluation.anchor_losses(self._plan.objective, draw, anchors))
        return self.anchor_losses()

    def anchor_gradients(self, place: slice = WHOLE) -> Tensor:
        """Gradients (E, P) of w* on this step's data, at some coordinates."""
        if self._at_anchor is None:  # held here, because other threads use the last batches' store, too
            assert self._plan.anchor_gradients is not None
            self._at_anchor = [self._plan.anchor_gradients(batch) for batch in self._batches]
        if len(self._batches) == 1:
            return self.of_each_chain(self._at_anchor[0][:, place])
        # Every chain has a batch of its own, and there is one w*.
        return torch.cat([gradients[:, place] for gradients in self._at_anchor])

    def control(self, place: slice = WHOLE) -> Tensor:
        """g_b(w*) − ḡ (E, P): the control variate of this step's gradient, at some coordinates."""
        mean = self._plan.mean
        assert mean is not None
        return self.anchor_gradients(place) - self.of_each_chain(mean.whole[:, place])

    def of_each_chain(self, values: Tensor) -> Tensor:
        """Values (C, ...) of every w*, for each chain (E, ...)."""
        return values.expand(self._chains, -1) if self._owners is None else values[self._owners]


def token_weights_of(plan: Plan) -> Callable[[int], Tensor | None]:
    """Step -> weights (T,) of the tokens' losses in the driving loss; None stands for their mean.

    Subsequence loss: the mean over the first k tokens, k uniform on 1..T, the same k for all chains of a step.
    """
    if plan.config.eval_loss_fn == "mse":
        return lambda step: None
    first = plan.batches(0, 0) if plan.config.independent_batches else plan.batches(0)
    tokens = plan.objective.losses(plan.objective.anchor[None], first).shape[1]
    if tokens == 1:
        raise ValueError(
            "eval_loss_fn='subsequence-mse' needs one loss per token; give a loss_fn that returns a vector (T,)"
        )
    stream = Stream(plan.config.seed, "subsequence")

    def weights(step: int) -> Tensor:
        length = int(stream.integers(step, tokens, (1,))) + 1
        return torch.where(torch.arange(tokens) < length, 1.0 / length, 0.0).to(plan.objective.anchor)

    return weights
