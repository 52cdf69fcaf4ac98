"""The batches of an estimate as a function of the step, whatever form the user gave them in; and n, the size of the data, if known.

Shapes: B batch.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import isgenerator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from icl.sampling.loaders import LoaderSteps, Recent, Spool, WithWorkers
from icl.streams import Stream

Batch = Any
BatchSource = Callable[..., Batch]


@dataclass(frozen=True)
class Supply:
    """Batches by step.

    Attributes:
        source: step -> batch, or (step, chain seed) -> batch if every chain has its own batches.
        num_samples: n, if the data have a known size. A callable may say it by an attribute of this name.
        everything: all batches of a finite data set, made on access; None if the data are endless, or if this is unknown.
        constant: whether every step uses the same batch.
        cycle: length of the cycle, if the batches are used in turn; None if they are not, or if this is unknown.
        stride: steps after which a batch is independent of this one: the length of a pass, if every pass is shuffled anew.
        per_pass: steps in which every sample comes once; None for endless data, for batches drawn at random, or if this is unknown. A
            callable may say it in the same way.
        sizes: number of samples of each batch of `everything`.
    """

    source: BatchSource
    num_samples: int | None = None
    everything: Sequence[Batch] | None = None
    constant: bool = False
    cycle: int | None = None
    stride: int = 1
    per_pass: int | None = None
    sizes: Sequence[int] = ()


MOST_EVALUATED = 256
"""The largest number of a loader's batches on which every draw may be evaluated."""


def supply_of(
    batches: BatchSource | Iterable[Batch], independent: bool, seed: int, shuffled: bool = False, batch_size: int = 1024
) -> Supply:
    """The user's batches as a `Supply`. It keeps no data in memory beyond what the user keeps.

    - A callable is used as it is.
    - A list is used in turn, again and again. With `independent`, each chain starts at a place given by its seed. Batches of unequal size
      are drawn in proportion to their sizes, so that their mean gradient is that of the data.
    - A loader that shuffles does so anew in every pass, as a function of the seed. A smaller last batch is left out, because its samples
      change from pass to pass.
    - A data set is shuffled and read in batches of `batch_size`.
    - A stream is read only as far as needed. A stream that ends starts again.

    Args:
        shuffled: draw batches at random if they are the same in every pass. Batches used in turn act as a periodic force. A stiff direction
            with curvature λ oscillates by an angle of h √λ ~ 1 per step. If both periods match, the chain resonates: with 5 batches and
            little friction λ̂ was 41 % too large instead of 8 % (`tests/sampling/test_honesty.py`).
        batch_size: of a data set, whose samples are put together here.

    Raises:
        ValueError: a mapping, a tensor, or no batch at all.
    """
    if _is_hugging_face(batches):
        batches = _batched_table(batches, batch_size)
    elif isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        _refuse_no_data(batches)
        batches = DataLoader(batches, batch_size=min(batch_size, _length(batches) or batch_size), shuffle=True)
    elif isinstance(batches, IterableDataset):
        batches = DataLoader(batches, batch_size=batch_size)
    if isinstance(batches, Mapping | Tensor):
        kind = type(batches).__name__
        raise ValueError(f"batches is a {kind}, which is one batch at most; give a list of batches: [batch]")
    if (
        isinstance(batches, DataLoader)
        and not isinstance(batches.dataset, IterableDataset)
        and _length(batches) is not None
    ):
        return _of_loader(batches, independent, seed, shuffled)
    if callable(batches):
        source = _checked(batches, independent)
        return Supply(source, getattr(batches, "num_samples", None), per_pass=getattr(batches, "per_pass", None))
    if not isinstance(batches, Sequence) and not hasattr(batches, "__getitem__"):
        sized, spool = hasattr(batches, "__len__") and _length(batches) is not None, Spool(batches, seed)
        if not sized or isinstance(batches, DataLoader):
            return Supply(_from_place(spool, independent))
        batches = spool.read_all()
    held: Any = batches
    if not len(held):
        raise ValueError("batches is empty; give at least one batch")
    sizes = [num_samples(held[place]) for place in range(len(held))]
    return _of_fixed(held, sizes, independent, seed, shuffled, _size_of(held, sizes))


def _of_fixed(
    held: Sequence[Batch], sizes: Sequence[int], independent: bool, seed: int, shuffled: bool, samples: int | None
) -> Supply:
    """Batches that are the same in every pass."""
    order = _BySize(sizes, seed) if len(set(sizes)) > 1 or (shuffled and len(held) > 1) else None
    source, cycle = _cycled(held, independent, order), len(held) if order is None else None
    return Supply(source, samples, held, len(held) == 1, cycle, per_pass=cycle, sizes=sizes)


def _of_loader(loader: DataLoader, independent: bool, seed: int, shuffled: bool) -> Supply:
    """The batches of a loader over a data set that can be indexed."""
    _refuse_no_data(loader.dataset)
    steps = LoaderSteps(loader, seed)
    if not steps.first:
        raise ValueError("batches is empty: the loader gives no batch (is batch_size above the data, with drop_last?)")
    count = len(steps.first)
    first_pass = _Lazy(Recent(steps.of_first_pass), count)
    # Without a batch sampler an index gives a batch whose size shows when it is made.
    known = loader.batch_sampler is not None
    sizes = [len(each) for each in steps.first] if known else [num_samples(each) for each in first_pass]
    if steps.fixed:
        return _of_fixed(first_pass, sizes, independent, seed, shuffled, sum(sizes))
    make = WithWorkers(steps, loader) if loader.num_workers else steps.__getitem__
    source = _from_place(Recent(make), independent)
    return Supply(source, sum(sizes), first_pass, stride=steps.per_pass, per_pass=steps.per_pass, sizes=sizes)


def on_device(supply: Supply, device: torch.device) -> Supply:
    """The same supply with its batches moved to a device."""
    place = Placed(device)
    everything = supply.everything
    if everything is not None:
        own = everything
        everything = _Lazy(lambda index: place(own[index]), len(own))
    source = supply.source
    return replace(supply, source=lambda *arguments: place(source(*arguments)), everything=everything)


def evaluation_supply(batches: BatchSource | Iterable[Batch], seed: int, device: torch.device) -> Supply:
    """The supply of a finite data set, or of a function index -> batch, on a device.

    Raises:
        ValueError: there are no batches, or they are no function and have no end.
    """
    supply = on_device(supply_of(batches, False, seed), device)
    too_many = isinstance(batches, DataLoader) and len(supply.sizes) > MOST_EVALUATED
    if not callable(batches) and (supply.everything is None or too_many):
        raise ValueError(
            "these evaluation batches have no end, or are too many; give a list of them, or index -> batch"
        )
    return supply


class _Lazy(Sequence[Batch]):
    """A sequence whose entries are made on access."""

    def __init__(self, make: Callable[[int], Batch], length: int) -> None:
        self._make, self._length = make, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._make(index % self._length)


class Placed:
    """Batch -> the batch on a device; the same object if it is there already.

    Tensors in lists, tuples, mappings and dataclasses are moved. Any other object is moved by its method `to`, if it has one.

    Raises:
        ValueError: it cannot be moved.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: tuple[Batch, Batch] | None = None

    def __call__(self, batch: Batch) -> Batch:
        last = self._last
        if last is not None and last[0] is batch:  # the same object again, for what is remembered of the last batch
            return last[1]
        try:
            moved = self._moved(batch)
        except (NotImplementedError, RuntimeError) as error:
            devices = sorted({str(tensor.device) for tensor in tensors_of(batch)})
            raise ValueError(
                f"a batch is on the device {' and '.join(devices)} and cannot be moved to the model's, {self._device}: {error}"
            ) from error
        self._last = (batch, moved)
        return moved

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.device == self._device else value.to(self._device)
        if isinstance(value, Mapping):
            moved = {key: self._moved(each) for key, each in value.items()}
            if all(moved[key] is each for key, each in value.items()):
                return value
            own: Any = copy.copy(value)
            return moved if type(value) is dict or not hasattr(own, "to") else own.to(self._device)
        if isinstance(value, list | tuple):
            parts = [self._moved(each) for each in value]
            if all(part is each for part, each in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if is_dataclass(value) and not isinstance(value, type):
            own = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
            parts = {name: self._moved(each) for name, each in own.items()}
            return value if all(parts[name] is each for name, each in own.items()) else replace(value, **parts)
        mover: Any = getattr(value, "to", None)
        return value if mover is None or isinstance(value, type) else mover(self._device)


def two_batches(supply: Supply, independent: bool, seed: int) -> tuple[Batch, Batch]:
    """Two batches, of different sizes if the supply has batches of different sizes."""
    first, second = (supply.source(step, seed) if independent else supply.source(step) for step in (0, 1))
    size, everything = num_samples(first), supply.everything
    other = next((place for place, each in enumerate(supply.sizes) if each != size), None)
    return first, second if other is None or everything is None else everything[other]


def num_samples(batch: Batch) -> int:
    """The number of samples of a batch: the first size of its first tensor. 1 for a batch without tensors, so that all weigh the same."""
    first = next(iter(tensors_of(batch)), None)
    return len(first) if first is not None and first.ndim > 0 else 1


def part_of(value: Any, chosen: slice | Tensor, size: int) -> Any:
    """Some samples of a batch of `size` samples, by a slice or by their indices. They are taken from the tensors whose first dimension has
    this size."""
    if isinstance(value, Tensor):
        return value[chosen] if value.ndim > 0 and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: part_of(each, chosen, size) for key, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [part_of(each, chosen, size) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: part_of(getattr(value, each.name), chosen, size) for each in fields(value) if each.init}
        return replace(value, **parts)
    return value


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
    elif is_dataclass(batch):
        for each in fields(batch):
            yield from tensors_of(getattr(batch, each.name))


def _size_of(held: Sequence[Batch], sizes: Sequence[int]) -> int | None:
    """n of a finite list, or None if it is not clear. It is not if a batch has no tensors, or tensors that begin with different sizes. Of
    other objects it is not either: they may be data sets, whose entries are samples."""
    first_sizes = {len(tensor) for tensor in tensors_of(held[0]) if tensor.ndim > 0}
    return sum(sizes) if isinstance(held, Sequence) and len(first_sizes) == 1 else None


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def _refuse_no_data(dataset: Any) -> None:
    if _length(dataset) == 0:
        raise ValueError("batches is empty: the data set has no samples")


def _is_hugging_face(batches: Any) -> bool:
    return all(hasattr(batches, name) for name in ("with_format", "column_names", "features"))


def _batched_table(table: Any, batch_size: int) -> Iterable[Batch]:
    """The batches of a Hugging Face data set, as PyTorch tensors unless it has a format of its own."""
    if (getattr(table, "format", None) or {}).get("type") is None:
        table = table.with_format("torch")
    length = _length(table)
    if length is None:
        return table.iter(batch_size=batch_size)
    _refuse_no_data(table)
    rows = _Rows(table)
    return DataLoader(rows, batch_size=min(batch_size, length), shuffle=True, collate_fn=rows.collate)


class _Rows(Dataset):
    """A table whose batches are read at once, by their indices."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self._table[list(indices)]

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """As it is: the table has put it together."""
        return batch


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


def _cycled(held: Sequence[Batch], independent: bool, order: "_BySize | None" = None) -> BatchSource:
    place = (lambda step: step % len(held)) if order is None else order
    return _from_place(lambda step: held[place(step)], independent)


def _from_place(source: Callable[[int], Batch], independent: bool) -> BatchSource:
    """The source. With `independent`, each chain starts at a place given by its seed."""
    return (lambda step, seed: source(step + seed % CHAINS_APART)) if independent else source


CHAINS_APART = 2**20


class _BySize:
    """Step -> index of a batch, drawn in proportion to the sizes; a pure function of seed and step."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self._edges = torch.tensor(sizes, dtype=torch.float64).cumsum(0) / sum(sizes)
        self._stream = Stream(seed, "batch-order")

    def __call__(self, step: int) -> int:
        place = self._stream.uniform(step, (1,)).double()
        return min(int(torch.searchsorted(self._edges, place, right=True)), len(self._edges) - 1)


def samples_needed(nbeta: float) -> int:
    """The number of samples for the mean gradient at w* if the data are endless: 30 nβ. Its noise then changes λ̂ by 3 %."""
    return math.ceil(30 * nbeta)
