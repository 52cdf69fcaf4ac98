"""Batches of a `DataLoader` or of a stream as functions of the step, without holding the data in memory.

If a loader's data set can be indexed, its parts are used separately. Its sampler draws the indices of pass p with a seed that depends on
(seed, p). A batch is made from its indices when it is needed. A stream can only be read forwards, so its batches are kept in a temporary
file.
"""

import logging
import pickle
import random
import tempfile
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from icl.streams import Stream

logger = logging.getLogger(__name__)

Batch = Any

SPOOL_BYTES = 8 * 2**30
"""The most bytes of a stream that are kept on disk. After them, its batches are repeated from the first."""

RECENT = 8
"""The number of latest batches that are kept in memory, because several groups of chains and the tests need them again."""

STREAK = 4
"""After this many consecutive steps, worker processes are started for the next ones."""

_global_state = threading.RLock()


@contextmanager
def seeded(seed: int, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Seed the random states of PyTorch, NumPy, Python and these generators for a `with` block. Afterwards they are as before."""
    with _global_state, ExitStack() as restored:
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - a user's data set may draw from it
        restored.callback(torch.set_rng_state, before[0])
        restored.callback(np.random.set_state, before[1])
        restored.callback(random.setstate, before[2])
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        for generator in generators:
            restored.callback(generator.set_state, generator.get_state())
            generator.manual_seed(seed)
        yield


class LoaderSteps(Dataset):
    """Step -> batch of a sized loader over a data set that can be indexed: a pure function of the step, also in a worker process.

    Args:
        loader: the loader whose sampler, data set and collation are used.
        seed: seed of the order, and of all random numbers that the data set draws.

    Attributes:
        first: the indices of the first pass.
        fixed: whether all passes are equal. A single batch of all samples counts as the same batch in any order.
        per_pass: number of batches of a pass, without a smaller last one if passes differ.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self.dataset, self._collate = loader.dataset, loader.collate_fn
        self._batched = loader.batch_sampler is not None
        self._sampler: Any = loader.batch_sampler if self._batched else loader.sampler
        inner = (loader, self._sampler, getattr(self._sampler, "sampler", None))
        found = {id(each): each for each in (getattr(part, "generator", None) for part in inner) if each is not None}
        self._generators = tuple(found.values())
        self._stream = Stream(seed, "loader")
        self._passes: OrderedDict[int, list[Any]] = OrderedDict()
        self.first = self.indices(0)
        sizes = [len(each) for each in self.first] if self._batched else []
        same_size = len(set(sizes[:-1])) <= 1
        again = self.indices(1)
        whole = len(sizes) == len(again) == 1 and sorted(map(repr, self.first[0])) == sorted(map(repr, again[0]))
        self.fixed = self.first == again or whole or not same_size
        smaller = len(sizes) > 1 and sizes[-1] < sizes[0]
        self.per_pass = len(self.first) - (1 if smaller and not self.fixed else 0)

    def indices(self, number: int) -> list[Any]:
        """The indices of each batch in a pass, drawn by the sampler."""
        if number not in self._passes:
            parts: tuple[Any, ...] = (self._sampler, getattr(self._sampler, "sampler", None))
            with seeded(self._seed(f"pass/{number}"), self._generators), ExitStack() as restored:
                for part in parts:
                    if hasattr(part, "set_epoch"):
                        restored.callback(part.set_epoch, getattr(part, "epoch", 0))
                        part.set_epoch(number)
                self._passes[number] = [list(each) if self._batched else each for each in self._sampler]
            while len(self._passes) > 3:
                self._passes.popitem(last=False)
        return self._passes[number]

    def of_first_pass(self, place: int) -> Batch:
        """A batch of the first pass, which may be the smaller last one."""
        return self._made(self.first[place], f"batch/0/{place}")

    def __getitem__(self, step: int) -> Batch:
        number, place = divmod(step, self.per_pass)
        if self.fixed:
            return self.of_first_pass(place)
        return self._made(self.indices(number)[place], f"batch/{number}/{place}")

    def _made(self, chosen: Any, name: str) -> Batch:
        data: Any = self.dataset
        with seeded(self._seed(name), self._generators):
            if not self._batched:
                return self._collate(data[chosen])
            samples = data.__getitems__(chosen) if hasattr(data, "__getitems__") else [data[index] for index in chosen]
            return self._collate(samples)

    def _seed(self, name: str) -> int:
        return self._stream.child(name).key()[0] & 0x7FFFFFFF


class Recent:
    """Step -> batch. The latest batches are kept, so that the same step gives the same object. Several threads may call it."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._kept: OrderedDict[int, Batch] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, step: int) -> Batch:
        with self._lock:
            if step not in self._kept:
                self._kept[step] = self._make(step)
                while len(self._kept) > RECENT:
                    self._kept.popitem(last=False)
            return self._kept[step]


class WithWorkers:
    """Step -> batch. If steps come in order, the loader's worker processes make the next batches ahead."""

    def __init__(self, steps: LoaderSteps, loader: DataLoader) -> None:
        self._steps, self._loader = steps, loader
        self._ahead: Iterator[Batch] | None = None
        self._next = self._streak = self._idle = 0
        self._last = -2

    def __call__(self, step: int) -> Batch:
        self._streak = self._streak + 1 if step == self._last + 1 else 0
        self._last = step
        if self._ahead is not None and step == self._next:
            self._next, self._idle = step + 1, 0
            return next(self._ahead)
        self._idle += 1
        # Threads at different steps must not restart the workers at every step.
        if self._streak >= STREAK and (self._ahead is None or self._idle > 4 * STREAK):
            self._ahead, self._next, self._idle = self._started(step + 1), step + 1, 0
        return self._steps[step]

    def _started(self, first: int) -> Iterator[Batch]:
        theirs = self._loader
        return iter(
            DataLoader(
                self._steps, batch_size=None, sampler=range(first, 2**31), collate_fn=_as_it_is,
                num_workers=theirs.num_workers, worker_init_fn=theirs.worker_init_fn, timeout=theirs.timeout,
                prefetch_factor=theirs.prefetch_factor, multiprocessing_context=theirs.multiprocessing_context,
                generator=torch.Generator().manual_seed(0),
            )
        )  # fmt: skip


def _as_it_is(batch: Batch) -> Batch:
    return batch


class Spool(Sequence[Batch]):
    """The batches of an iterator. They are read when they are needed, and kept in a temporary file so that they can be read again.

    Args:
        batches: what is read. Iterating over it may draw random numbers, as a `DataLoader` does.
        seed: of the random numbers that are drawn while it is read; the caller's random states stay as they are.
        limit: bytes on disk.

    Raises:
        ValueError: the iterator has no batches.
    """

    def __init__(self, batches: Iterable[Batch], seed: int, limit: int = SPOOL_BYTES) -> None:
        self._stream, self._starts = Stream(seed, "spool"), [0]
        own = getattr(batches, "generator", None)
        self._generators = () if own is None else (own,)
        with self._seeded("begin"):
            self._rest: Iterator[Batch] | None = iter(batches)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this
        weakref.finalize(self, self._file.close)
        self._limit = limit
        self._recent: deque[tuple[int, Batch]] = deque(maxlen=RECENT)
        self._lock = threading.RLock()
        self(0)

    @property
    def ended(self) -> bool:
        """Whether the iterator will not be read any more."""
        return self._rest is None

    def __len__(self) -> int:
        """Batches read so far."""
        return len(self._starts) - 1

    def read_all(self) -> Sequence[Batch]:
        """Read all batches, and return them."""
        while not self.ended:
            self(len(self))
        return self

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self(place)

    def __call__(self, step: int) -> Batch:
        with self._lock:
            while self._rest is not None and step >= len(self):
                self._read_one()
            if not len(self):
                raise ValueError("batches is empty; give at least one batch")
            place = step % len(self)
            for number, batch in self._recent:
                if number == place:
                    return batch
            self._file.seek(self._starts[place])
            batch = pickle.load(self._file)
            self._recent.append((place, batch))
            return batch

    def _read_one(self) -> None:
        assert self._rest is not None
        try:
            with self._seeded(str(len(self))):
                batch = next(self._rest)
        except StopIteration:
            self._rest = None
            return
        try:
            data = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise ValueError(
                f"batches is a stream of {type(batch).__name__}, which cannot be kept on disk ({error}); give a function step -> batch"
            ) from error
        try:
            self._file.seek(self._starts[-1])
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            if not len(self):
                raise
            self._stop(f"the disk takes no more of it ({error.strerror or error})")
            return
        self._recent.append((len(self), batch))
        self._starts.append(self._starts[-1] + len(data))
        if self._starts[-1] > self._limit:
            self._stop(f"it is longer than {self._limit / 2**30:.3g} GiB")

    def _seeded(self, name: str) -> AbstractContextManager[None]:
        return seeded(self._stream.child(name).key()[0] & 0x7FFFFFFF, self._generators)

    def _stop(self, reason: str) -> None:
        self._rest = None
        logger.warning("only the first %d batches of the stream are used, again and again: %s", len(self), reason)
