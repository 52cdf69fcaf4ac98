"""The loss of any module on fixed data: what the analyses of any subject measure.

Shapes: P trainable parameters.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from icl.sampling import SamplerConfig
from icl.sampling.look import look_at
from icl.sampling.objective import Batch, LossFunction, ModuleObjective
from icl.sampling.supply import num_samples
from icl.subjects import Subject
from icl.subjects.subject import batches_in_order

SAMPLES = 1024
"""The number of samples, unless another one is asked for. It is that of the regression run's Hessian."""


@dataclass(frozen=True)
class LossOnData:
    """L(w) = Σ_b n_b L_b(w) / Σ_b n_b, the loss at weights w of a module over batches b of n_b samples.

    Attributes:
        model: at w*, the weights of a checkpoint.
        loss_fn: the loss of one batch.
        batches: the batches, at least one.
    """

    model: nn.Module
    loss_fn: LossFunction
    batches: Sequence[Batch]

    @classmethod
    def of_subject(
        cls,
        subject: Subject,
        step: int,
        model: nn.Module,
        sampler: SamplerConfig,
        samples: int,
        device: torch.device | str = "cpu",
    ) -> "LossOnData":
        """The loss of a subject's model at a checkpoint, on the first batches of its data that hold `samples` samples together.

        If the data end before, these are all. The order of a loader that shuffles is a function of the sampler's `init_seed`.

        Raises:
            ValueError: the subject gives no batch.
        """
        batches, count = [], 0
        for batch in batches_in_order(subject, step, sampler, device):
            batches.append(batch)
            count += num_samples(batch)
            if count >= samples:
                break
        return cls(model, subject.loss, batches)

    @cached_property
    def objective(self) -> ModuleObjective:
        """The loss of one batch as a function of the trainable parameters (P,).

        Raises:
            ValueError: the model, the loss or the data cannot be used (`icl.sampling.look.look_at`).
        """
        objective = ModuleObjective(self.model, self.loss_fn)
        look_at(objective, *itertools.islice(self.batches, 2))
        return objective

    @property
    def weights(self) -> list[float]:
        """n_b / Σ n_b of each batch."""
        sizes = [num_samples(batch) for batch in self.batches]
        return [size / sum(sizes) for size in sizes]

    @property
    def terms(self) -> list[tuple[float, Callable[[Tensor], Tensor]]]:
        """n_b / Σ n_b and L_b, a function of the trainable parameters (P,), of each batch."""
        losses = [lambda flat, batch=batch: self.objective.loss_at(flat, batch) for batch in self.batches]
        return list(zip(self.weights, losses, strict=True))

    def value(self) -> float:
        """L(w*)."""
        point = self.objective.anchor
        with torch.no_grad():
            return sum(weight * float(loss(point)) for weight, loss in self.terms)
