"""The batches of an estimate: what the user gave, turned into a function of the step; and n, the size of the data, if that is known.

Shapes: B batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import isgenerator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from icl.streams import Stream

Batch = Any
BatchSource = Callable[..., Batch]

HELD_BYTES = 2**30
"""What is kept of an iterable that does not say how long it is; past that its batches are met again."""


@dataclass(frozen=True)
class Supply:
    """Batches by step.

    Attributes:
        source: step -> batch, or (step, chain seed) -> batch where chains see batches of their own.
        num_samples: n, where the data tell it.
        everything: all batches of a finite data set, with their sizes as weights; None where there is no end, or not known.
        constant: whether every step meets the same batch.
        cycle: how many batches are met in turn, again and again; None where they are not, or where it is not known.
    """

    source: BatchSource
    num_samples: int | None = None
    everything: Sequence[Batch] | None = None
    constant: bool = False
    cycle: int | None = None


def supply_of(batches: BatchSource | Iterable[Batch], independent: bool, seed: int, shuffled: bool = False) -> Supply:
    """What a user gave for batches, in one form.

    A callable stays as it is. An iterable is cycled; with `independent`, from a place given by the chain's seed. Batches of
    unequal size are met in proportion to their sizes, so that their mean gradient is that of the data.

    Args:
        shuffled: draw the batches of a finite iterable at random. Batches in turn are a periodic force. Where its period meets that of a
            stiff direction, which a step of h √λ ~ 1 turns by as much per step, the chain resonates: at 5 batches and little friction
            λ̂ rose by 41 % in place of 8 % (`tests/sampling/test_honesty.py`).

    Raises:
        ValueError: a Dataset in place of a loader, a mapping, or nothing at all.
    """
    if isinstance(batches, Dataset):
        raise ValueError(
            "batches is a Dataset, which gives single samples; give batches of it: DataLoader(dataset, batch_size=...)"
        )
    if isinstance(batches, Mapping | Tensor):
        kind = type(batches).__name__
        raise ValueError(f"batches is a {kind}, which is one batch at most; give a list of batches: [batch]")
    if callable(batches):
        return Supply(_checked(batches, independent))
    if not hasattr(batches, "__len__"):
        return Supply(_cycled(_Held(iter(batches)), independent))
    held = list(batches)
    if not held:
        raise ValueError("batches is empty; give at least one batch")
    sizes = [num_samples(batch) for batch in held]
    order = _BySize(sizes, seed) if len(set(sizes)) > 1 or (shuffled and len(held) > 1) else None
    source, cycle = _cycled(held, independent, order), len(held) if order is None else None
    return Supply(source, _size_of(batches, held, sizes), held, len(held) == 1, cycle)


def two_batches(supply: Supply, independent: bool, seed: int) -> tuple[Batch, Batch]:
    """A batch and another one, of another size where there is one."""
    first, second = (supply.source(step, seed) if independent else supply.source(step) for step in (0, 1))
    size = num_samples(first)
    return first, next((each for each in supply.everything or () if num_samples(each) != size), second)


def num_samples(batch: Batch) -> int:
    """Samples of a batch: the first size of its first tensor. 1 for other kinds of batch, which then all weigh the same."""
    first = next(iter(tensors_of(batch)), None)
    return len(first) if first is not None and first.ndim > 0 else 1


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_of(value)


def _size_of(batches: Any, held: Sequence[Batch], sizes: Sequence[int]) -> int | None:
    """n of a finite list or loader; None where its batches are of no kind that has a size."""
    if all(next(iter(tensors_of(batch)), None) is not None for batch in held):
        return sum(sizes)
    return len(batches.dataset) if hasattr(batches, "dataset") else None


def _checked(source: BatchSource, independent: bool) -> BatchSource:
    """The callable, after its first call."""
    arguments = (0, 0) if independent else (0,)
    try:
        first = source(*arguments)
    except TypeError as error:
        form = "(step, chain seed)" if independent else "step"
        raise ValueError(f"batches must be callable as {form} -> batch ({error})") from error
    if isgenerator(first) or (isinstance(first, Iterator) and not isinstance(first, Tensor)):
        raise ValueError(
            "batches(step) gave an iterator; it must give the batch of that step (or pass the iterator itself)"
        )
    return source


def _cycled(held: "Sequence[Batch] | _Held", independent: bool, order: "_BySize | None" = None) -> BatchSource:
    place = (lambda step: step % len(held)) if order is None else order
    if independent:
        return lambda step, seed: held[place(step + seed)]
    return lambda step: held[place(step)]


class _BySize:
    """Step -> index of a batch, drawn in proportion to the sizes; a pure function of seed and step."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self._edges = torch.tensor(sizes, dtype=torch.float64).cumsum(0) / sum(sizes)
        self._stream = Stream(seed, "batch-order")

    def __call__(self, step: int) -> int:
        place = self._stream.uniform(step, (1,)).double()
        return min(int(torch.searchsorted(self._edges, place, right=True)), len(self._edges) - 1)


class _Held:
    """The batches of an iterator, read as far as they are asked for and kept while they fit HELD_BYTES."""

    def __init__(self, rest: Iterator[Batch]) -> None:
        self._rest: Iterator[Batch] | None = rest
        self._kept: list[Batch] = []
        self._bytes = 0
        self[0]

    def __len__(self) -> int:
        return len(self._kept) if self._rest is None else 2**62

    def __getitem__(self, step: int) -> Batch:
        while self._rest is not None and step >= len(self._kept):
            try:
                batch = next(self._rest)
            except StopIteration:
                self._rest = None
                break
            self._kept.append(batch)
            self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
            if self._bytes > HELD_BYTES:
                self._rest = None
        if not self._kept:
            raise ValueError("batches is empty; give at least one batch")
        return self._kept[step % len(self._kept)]


def samples_needed(nbeta: float) -> int:
    """Samples over which the mean gradient at w* is taken where the data have no end: 30 nβ, which leaves 3 % of λ̂ to its noise."""
    return math.ceil(30 * nbeta)
