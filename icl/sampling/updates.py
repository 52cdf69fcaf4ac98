"""One update of chains, with what a draw needs of their weights: of chains as one tensor, or of one large chain in pieces.

A large chain's weights do not fit into the processor's cache. Its update is done piece by piece, from the noise to the new weights, in
place. So each weight comes from memory once, and no temporary is as large as the model.

Shapes: E chains, P sampled parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icl.sampling.kernels import Kernel
from icl.sampling.noise import NOISE, shared_noise_blocks
from icl.sampling.pieces import WHOLE, added, pieces
from icl.sampling.sgld import SGLDConfig
from icl.streams import Stream

ENDLESS = 2**31
"""The most steps of a chain for which there is noise."""

Control = Callable[[slice], Tensor]
"""Coordinates -> the control variate g_b(w*) − ḡ (E, ·) there; see `icl.sampling.control`."""


class Seen(NamedTuple):
    """What a draw needs of weights w.

    Attributes:
        distance: (E,) ‖w − w*‖.
        correction: (E,) (g_b(w*) − ḡ)·(w − w*); None without a control variate.
    """

    distance: Tensor
    correction: Tensor | None


class Together:
    """The update of chains as one tensor.

    Args:
        kernel, constants: the sampler.
        seeds: one per chain. Noise number 0 of a seed's stream starts the chain, and number t + 1 is that of step t.
        like: (E, P), whose type and device the noise has.
        first: number of the first noise that is used.
    """

    def __init__(self, kernel: Kernel, constants: SGLDConfig, seeds: Sequence[int], like: Tensor, first: int) -> None:
        self._kernel, self._constants = kernel, constants
        self._noises = shared_noise_blocks(seeds, ENDLESS, like, first)

    def started(self, anchor: Tensor, epsilon: Tensor) -> Any:
        """The state at w* (E, P)."""
        return self._kernel.init(self._constants, anchor, epsilon, next(self._noises))

    def update(
        self, state: Any, gradient: Tensor, control: Control | None, step: int, total: Tensor | None
    ) -> tuple[Any, Seen | None]:
        """The state after the step from a gradient, less its control variate.

        If `total` is given, the weights before the step are those of a draw, as in `seen`.
        """
        own = control(WHOLE) if control else None
        seen = None if total is None else self.seen(state, total, own)
        driving = gradient if own is None else gradient - own
        return self._kernel.step(self._constants, state, driving, next(self._noises)), seen

    def seen(self, state: Any, total: Tensor, control: Tensor | None = None) -> Seen:
        """What a draw needs of the weights, which are added to `total`; with the control variate (E, P), if any."""
        away = state.position - state.anchor
        total += state.position
        return Seen(away.norm(dim=-1), None if control is None else (control * away).sum(dim=-1))


class InPieces:
    """The update of one chain (1, P), within the state's own tensors.

    Args:
        kernel, constants: the sampler.
        seed: of the chain; the noise is that of `Together`.
    """

    def __init__(self, kernel: Kernel, constants: SGLDConfig, seed: int) -> None:
        self._kernel, self._constants = kernel, constants
        self._noise = Stream(seed, NOISE)

    def started(self, anchor: Tensor, epsilon: Tensor) -> Any:
        """The state at w* (1, P)."""
        return self._kernel.init(self._constants, anchor, epsilon, self._noise_of(0, anchor, 0))

    def update(
        self, state: Any, gradient: Tensor, control: Control | None, step: int, total: Tensor | None
    ) -> tuple[Any, Seen | None]:
        """As `Together.update`; the state is the same one, in which the step has been made."""
        size = gradient.shape[1]
        sums = []
        for place in pieces(gradient) if self._kernel.elementwise else [slice(0, size)]:
            here, own = _at(state, place, size), control(place) if control else None
            if total is not None:
                sums.append(_sums(here, total[:, place], own))
            driving = gradient[:, place] if own is None else gradient[:, place] - own
            noise = self._noise_of(step + 1, driving, place.start)
            in_place = self._kernel.step_in_place
            if in_place is None or not in_place(self._constants, here, driving, noise):
                moved = self._kernel.step(self._constants, here, driving, noise)
                for name in (field.name for field in fields(here) if field.name not in ("anchor", "epsilon")):
                    getattr(here, name).copy_(getattr(moved, name))
        return state, _seen(sums) if sums else None

    def seen(self, state: Any, total: Tensor) -> Seen:
        """As `Together.seen`, without a control variate."""
        size = total.shape[1]
        return _seen([_sums(_at(state, place, size), total[:, place], None) for place in pieces(total)])

    def _noise_of(self, number: int, like: Tensor, start: int) -> Tensor:
        return self._noise.fill_normal(number, torch.empty(like.shape), start).to(like.dtype)


def _sums(here: Any, total: Tensor, control: Tensor | None) -> dict[str, Tensor]:
    """The parts of `Seen` that coordinates add. Their weights are added to `total`."""
    away = here.position - here.anchor
    total += here.position
    square = torch.linalg.vecdot(away, away)
    return (
        {"square": square} if control is None else {"square": square, "correction": torch.linalg.vecdot(control, away)}
    )


def _seen(sums: Sequence[dict[str, Tensor]]) -> Seen:
    whole = added(sums)
    return Seen(whole["square"].sqrt(), whole.get("correction"))


def _at(state: Any, place: slice, size: int) -> Any:
    """The kernel's state at some coordinates of `size`. What a chain has once, such as its step size, stays whole."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return replace(state, **{name: each[:, place] for name, each in values.items() if each.shape[1] == size})
