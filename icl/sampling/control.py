r"""Control variates: from the gradient of a batch at w, the gradient of the same batch at w* is subtracted.

    g(w) = g_b(w) − g_b(w*) + ḡ,        L(w) − L(w*) = L_b(w) − L_b(w*) − (g_b(w*) − ḡ)·(w − w*)

where ḡ is the mean gradient at w*. Both have the same mean as without the control variate. Their noise vanishes as w approaches w*, so
mini-batches heat a chain far less (Baker, Fearnhead, Fox & Nemeth, Statistics and Computing 2019). The gradient at w* is computed once for
all chains that share the batch.

Shapes: C anchors (w* of one model, or of several), P sampled parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.sampling.objective import Batch, Objective
from icl.sampling.supply import num_samples


class OfLastBatches:
    """Batch -> a tensor made from it. The tensors of the last two batches are kept: a step needs one, and its test another."""

    def __init__(self, make: Callable[[Batch], Tensor]) -> None:
        self._make = make
        self._last: tuple[tuple[Batch, Tensor], ...] = ()

    def __call__(self, batch: Batch) -> Tensor:
        # One tuple that is replaced as a whole, so that worker threads always read matching pairs.
        last = self._last
        for known, value in last:
            if known is batch:
                return value
        value = self._make(batch)
        self._last = ((batch, value), *last[:1])
        return value


class AnchorGradients(OfLastBatches):
    """Batch -> gradients (C, P) at every w*."""

    def __init__(self, objective: Objective, anchors: Tensor) -> None:
        super().__init__(lambda batch: objective.losses_and_gradients(anchors, batch, None)[1])


@dataclass(frozen=True)
class MeanGradient:
    """ḡ at every w*, from all the data or from a sample of batches.

    Attributes:
        whole: (C, P) the mean.
        halves: two means (C, P) over disjoint halves of the batches, whose errors are independent. Both are `whole` if it is exact.
        gradients: the number of gradients that it took at each w*.
        samples: the number of samples in the mean; None if these are all samples of the data.
    """

    whole: Tensor
    halves: tuple[Tensor, Tensor]
    gradients: int
    samples: int | None = None

    @property
    def error(self) -> Tensor:
        """(C, P) half the difference of the halves. It has the size of the error of `whole`; 0 if `whole` is exact."""
        return (self.halves[0] - self.halves[1]) / 2


def mean_gradient(
    at_anchor: AnchorGradients,
    everything: Sequence[Batch] | None,
    batch: Callable[[int], Batch],
    first: int,
    samples: int,
    most: int,
) -> MeanGradient:
    """ḡ over all of a finite data set, if it has at most `most` batches.

    Otherwise ḡ is over the batches of the steps from `first` on, until they hold `samples` samples or are `most`.
    """
    if everything is not None and len(everything) <= most:
        total, count = torch.zeros(()), 0
        for each in everything:
            size = num_samples(each)
            gradient = at_anchor(each) * size
            total, count = gradient if count == 0 else total + gradient, count + size
        total = total / count
        return MeanGradient(total, (total, total), len(everything))
    sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
    index, seen = 0, 0
    while seen < samples or index < 2:
        each = batch(first + index)
        sums[index % 2] = sums[index % 2] + at_anchor(each)
        counts[index % 2] += 1
        seen += num_samples(each)
        index += 1
        if index >= most:
            break
    halves = (sums[0] / counts[0], sums[1] / counts[1])
    return MeanGradient((sums[0] + sums[1]) / sum(counts), halves, index, seen)


def most_batches(chains: int, steps: int) -> int:
    """The largest number of batches for ḡ: a tenth of the number of the chains' gradients, but at least 256."""
    return max(256, chains * steps // 10)
