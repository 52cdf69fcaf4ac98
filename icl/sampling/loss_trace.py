"""Losses of named data at every draw, per sample or per sample and token. Influence and susceptibilities are computed from them.

Shapes: E chains, N draws, P sampled parameters, S samples, T tokens.
"""

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from icl.sampling.objective import Batch, Losses, LossFunction
from icl.sampling.supply import num_samples, tensors_of

if TYPE_CHECKING:
    import xarray as xr

Observables = Mapping[str, tuple[Sequence[Batch], LossFunction]]
"""Name -> (batches, per-sample loss): (predict, batch) -> losses (S,) or (S, T) of the batch's samples."""


class LossTrace:
    """A recorder of the losses of some data at every draw. They are kept in memory, or if they are too large, in a file.

    Args:
        name: name of the data, for messages.
        batches: the data, which are the same at every draw. Their samples are joined.
        objective_of: loss function -> `Losses` at the weights that the chains move.
        per_sample_loss: (predict, batch) -> (S,) or (S, T).
        num_chains, num_draws: numbers of chains and draws. There may be more draws later.
        max_bytes: the most bytes in memory. Larger losses go to a temporary file (in `TMPDIR`), which is removed with the last array that
            uses it.

    Attributes:
        shape: (S,) or (S, T), for all batches together.
        at_anchor: losses of w*, of that shape.

    Raises:
        ValueError: there are no batches, batches have different shapes, the loss is not one per sample, or it is not finite at w*.
    """

    def __init__(
        self,
        name: str,
        batches: Sequence[Batch],
        objective_of: Callable[[LossFunction], Losses],
        per_sample_loss: LossFunction,
        num_chains: int,
        num_draws: int,
        max_bytes: int,
    ) -> None:
        self._name, self._batches = name, _held(name, batches)
        self._objective = objective_of(per_sample_loss)
        parts = [self._at_anchor(objective_of, per_sample_loss, batch) for batch in self._batches]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = " and ".join(sorted({str(tuple(part.shape)) for part in parts}))
            raise ValueError(
                f"observable {name!r}: its batches have losses of shapes {shapes}; give sequences of one length"
            )
        self.at_anchor = np.concatenate(parts)
        self.shape = self.at_anchor.shape
        if not np.isfinite(self.at_anchor).all():
            worst = int(np.flatnonzero(~np.isfinite(self.at_anchor.reshape(len(self.at_anchor), -1)).all(axis=1))[0])
            raise ValueError(f"observable {name!r}: the loss of sample {worst} is not finite at w*")
        row = (num_chains, *self.shape)
        fits = 4 * num_draws * int(np.prod(row)) <= max_bytes
        self._rows: _InMemory | _InFile = _InMemory(row, num_draws) if fits else _InFile(row, name)
        self._lock = threading.Lock()
        self._draws = 0

    @property
    def in_file(self) -> bool:
        """Whether the losses are in a file."""
        return isinstance(self._rows, _InFile)

    def __call__(self, draw: int, positions: Tensor, chains: Tensor) -> None:
        """Record one draw of some chains."""
        losses = torch.cat([self._objective.losses(positions, batch) for batch in self._batches], dim=1)
        values = losses.float().cpu().numpy().reshape(len(chains), *self.shape)
        with self._lock:
            self._rows.write(draw, chains.cpu().numpy(), values)
            self._draws = max(self._draws, draw + 1)

    def array(self, **attributes: Any) -> "xr.DataArray":
        """The losses (chain, draw, sample[, token]), float32, with those of w* as the coordinate `at_w_star`."""
        import xarray as xr

        values = self._rows.read(self._draws).swapaxes(0, 1)
        own = ("sample", "token")[: len(self.shape)]
        dims = ("chain", "draw", *own)
        return xr.DataArray(
            values,
            dims=dims,
            coords={
                **{dim: np.arange(size) for dim, size in zip(dims, values.shape, strict=True)},
                "at_w_star": (own, self.at_anchor),
            },
            name=self._name,
            attrs={"long_name": f"loss of {self._name} at the draws", **attributes},
        )

    def _at_anchor(
        self, objective_of: Callable[[LossFunction], Losses], per_sample_loss: LossFunction, batch: Batch
    ) -> np.ndarray:
        """The losses of w*, in the shape in which they are given."""
        shapes: list[torch.Size] = []

        def watched(predict: Callable[..., Any], batch: Batch) -> Tensor:
            losses = per_sample_loss(predict, batch)
            shapes.append(losses.shape)
            return losses

        objective = objective_of(watched)
        losses = objective.losses(objective.anchor[None], batch)[0]
        shape = shapes[-1]
        size = num_samples(batch) if next(iter(tensors_of(batch)), None) is not None else None
        if len(shape) not in (1, 2) or (size is not None and shape[0] != size):
            wanted = "(samples,) or (samples, tokens)" if size is None else f"({size},) or ({size}, tokens)"
            raise ValueError(
                f"observable {self._name!r}: its loss has shape {tuple(shape)}; it must return one per sample, {wanted} "
                "(reduction='none')"
            )
        return losses.float().cpu().numpy().reshape(tuple(shape))


def _held(name: str, batches: Sequence[Batch]) -> list[Batch]:
    if isinstance(batches, Tensor | Mapping) or callable(batches):
        raise ValueError(f"observable {name!r}: give its data as a list of batches, such as [batch]")
    held = list(batches)
    if not held:
        raise ValueError(f"observable {name!r} has no batches")
    return held


class _InMemory:
    """Draws (N, E, ...) in an array that grows."""

    def __init__(self, row: tuple[int, ...], draws: int) -> None:
        self._values = np.full((draws, *row), np.nan, dtype=np.float32)

    def write(self, draw: int, chains: np.ndarray, values: np.ndarray) -> None:
        if draw >= len(self._values):
            more = np.full((max(draw + 1, 2 * len(self._values)) - len(self._values), *self._values.shape[1:]), np.nan)
            self._values = np.concatenate([self._values, more.astype(np.float32)])
        self._values[draw, chains] = values

    def read(self, draws: int) -> np.ndarray:
        return self._values[:draws]


class _InFile:
    """Draws (N, E, ...) in a nameless temporary file."""

    def __init__(self, row: tuple[int, ...], name: str) -> None:
        self._row, self._name = row, name
        self._chain_bytes = 4 * int(np.prod(row[1:]))
        self._file, path = tempfile.mkstemp(prefix="icl-observable-")
        os.unlink(path)  # without a name, so that it is removed with its last user, however the process ends
        weakref.finalize(self, os.close, self._file)

    def write(self, draw: int, chains: np.ndarray, values: np.ndarray) -> None:
        try:
            for chain, own in zip(chains.tolist(), values, strict=True):
                data = memoryview(own.tobytes())
                place = (draw * self._row[0] + chain) * self._chain_bytes
                while data:
                    written = os.pwrite(self._file, data, place)
                    data, place = data[written:], place + written
        except OSError as error:
            raise OSError(
                error.errno,
                f"the losses of observable {self._name!r} do not fit on the disk of {tempfile.gettempdir()} ({error.strerror}); set "
                "TMPDIR to a larger one, raise max_memory_bytes, or observe fewer samples",
            ) from error

    def read(self, draws: int) -> np.ndarray:
        with open(os.dup(self._file), "rb") as file:
            return np.memmap(file, dtype=np.float32, mode="r", shape=(draws, *self._row))
