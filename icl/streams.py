"""Named random streams: every random number is a pure function of (seed, purpose, step, position).

The generator is Threefry-2x32-20 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011), a counter-based generator of 32-bit additions, rotations and exclusive-ors. It has no state, so that

- batch k can be made without batches 0..k-1: resuming, sharding and re-evaluating are exact;
- a member of an ensemble sees the same numbers whichever others are drawn beside it;
- the bits are the same on every device (the normal deviates agree to the rounding of `log`, `cos` and `sin`).

Shapes: E members, S steps, N numbers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.native.random import fill_normals, threefry_words, words_of

MANY = 2**13
"""From so many normal deviates on they are made piece by piece, so that what is on the way stays in the cache."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA


def threefry2x32(key0: Tensor, key1: Tensor, counter0: Tensor, counter1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds on int32 tensors that broadcast against each other; returns two int32 words.

    Raises nothing: any key and counter are valid. Overflow of int32 wraps, which is the arithmetic modulo 2^32 that
    the algorithm needs.
    """
    keys = (key0, key1, key0 ^ key1 ^ _KEY_PARITY)
    shape = torch.broadcast_shapes(key0.shape, counter0.shape, counter1.shape)
    x0 = (counter0 + key0).expand(shape).clone()
    x1 = (counter1 + key1).expand(shape).clone()
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 += x1
            # int32 shifts right arithmetically; the mask makes the shift logical. Functions, not `<<` and `>>`: XLA takes
            # those for products and quotients, of other types and rounded otherwise.
            low = torch.bitwise_right_shift(x1, 32 - rotation) & ((1 << rotation) - 1)
            x1 = (torch.bitwise_left_shift(x1, rotation) | low) ^ x0
        x0 += keys[(group + 1) % 3]
        x1 += keys[(group + 2) % 3] + (group + 1)
    return x0, x1


@dataclass(frozen=True)
class Stream:
    """The random numbers of one purpose.

    Attributes:
        seed: any integer.
        purpose: what the numbers are for, such as "pretrain/inputs"; different purposes are independent streams.
    """

    seed: int
    purpose: str

    def child(self, name: str) -> "Stream":
        """The stream of a narrower purpose."""
        return Stream(self.seed, f"{self.purpose}/{name}")

    def key(self) -> tuple[int, int]:
        """The two signed 32-bit key words, from BLAKE2b of seed and purpose."""
        digest = hashlib.blake2b(f"{self.seed}\0{self.purpose}".encode(), digest_size=8).digest()
        return (
            int.from_bytes(digest[:4], "little", signed=True),
            int.from_bytes(digest[4:], "little", signed=True),
        )

    def normal(self, step: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal deviates, float32, of the given shape; number i does not depend on how many are drawn."""
        count = math.prod(shape)
        if torch.device(device).type == "cpu" and count >= MANY:
            return self.fill_normal(step, torch.empty(tuple(shape)))
        return _normals_of(*self._words(step, _half(count), device), count).reshape(tuple(shape))

    def fill_normal(self, step: int, out: Tensor, start: int = 0) -> Tensor:
        """The same numbers, from number `start` on, which is even, written into a contiguous float32 tensor on the CPU."""
        assert start % 2 == 0, "numbers are made in pairs"
        if not fill_normals(self.key(), _signed32(step), out.view(-1), start):
            count = out.numel()
            out.copy_(_normals_of(*self._words(step, _half(count), "cpu", start), count).view(out.shape))
        return out

    def uniform(self, step: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Uniform deviates in (0, 1), float32 with 24 bits."""
        count = math.prod(shape)
        words = torch.stack(self._words(step, _half(count), device), dim=-1).flatten()[:count]
        return _unit_interval(words).reshape(tuple(shape))

    def signs(self, step: int, count: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
        """Signs ±1 with equal probability, float32 (count,), from number `start` (even) on: -1 where `uniform` is below one half."""
        assert start % 2 == 0, "numbers are made in pairs"
        words = torch.stack(self._words(step, _half(count), device, start), dim=-1).flatten()[:count]
        return (words < 0).to(torch.float32).mul_(2.0).sub_(1.0)

    def integers(self, step: int, high: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Uniform integers in [0, high), int64; the bias is below high / 2^32.

        Raises:
            ValueError: `high` is not in 1..2^31.
        """
        if not 1 <= high <= 2**31:
            raise ValueError(f"high must lie in 1..2**31, got {high}")
        count = math.prod(shape)
        words = torch.stack(self._words(step, _half(count), device), dim=-1).flatten()[:count]
        unsigned = words.to(torch.int64) & 0xFFFFFFFF
        return scaled_down(unsigned, high).reshape(tuple(shape))

    def _words(self, step: int, count: int, device: torch.device | str, start: int = 0) -> tuple[Tensor, Tensor]:
        """The words of `count` pairs of numbers; the first is number `start`."""
        if torch.device(device).type == "cpu":
            words = threefry_words(self.key(), _signed32(step), count, start // 2)  # the same bits, in fewer calls
            return words[0], words[1]
        key = torch.tensor(self.key(), dtype=torch.int32, device=device)
        counter = torch.arange(start // 2, start // 2 + count, dtype=torch.int32, device=device)
        # The step as data, not as a number: a lazy device (xla) would compile each number anew, and 0 and 1 as scalars too.
        return threefry2x32(
            key[:1], key[1:], torch.tensor([_signed32(step)], dtype=torch.int32, device=device), counter
        )


def normals_of_streams(
    streams: Sequence[Stream], step: int, shapes: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> list[Tensor]:
    """`stream.normal(step, shape)` of several streams, computed in one go: for small batches, calls cost more than numbers."""
    counts = [math.prod(shape) for shape in shapes]
    words = [stream._words(step, _half(count), device) for stream, count in zip(streams, counts, strict=True)]
    word0, word1 = (torch.cat(part) for part in zip(*words, strict=True))
    padded = [2 * _half(count) for count in counts]
    parts = _normals_of(word0, word1, sum(padded)).split(padded)
    return [part[:count].reshape(tuple(shape)) for part, count, shape in zip(parts, counts, shapes, strict=True)]


def keys_of(streams: Sequence[Stream], device: torch.device | str = "cpu") -> Tensor:
    """The keys of several streams, int32 (E, 2), for `normals`."""
    return torch.tensor([stream.key() for stream in streams], dtype=torch.int32, device=device)


def normals(keys: Tensor, steps: Tensor, count: int) -> Tensor:
    """Standard normal deviates of E streams at S steps at once: keys (E, 2), steps (S,) -> float32 (E, S, count).

    The same bits as `Stream.normal(step, (count,))` for every member and step.
    """
    words = words_of(keys, steps, _half(count)) if keys.device.type == "cpu" else None
    if words is None:
        counter = torch.arange(_half(count), dtype=torch.int32, device=keys.device)
        words = threefry2x32(
            keys[:, 0, None, None], keys[:, 1, None, None], steps.to(torch.int32)[None, :, None], counter[None, None, :]
        )
    return _normals_of(*words, count)


def scaled_down(words: Tensor, high: int) -> Tensor:
    """Map words in [0, 2^32), as int64, to integers in [0, high), high <= 2^31."""
    return torch.bitwise_right_shift(words * high, 32)


def _normals_of(word0: Tensor, word1: Tensor, count: int) -> Tensor:
    """Box and Muller's transform of word pairs; a pair gives two neighbouring numbers, so that a prefix stays a
    prefix."""
    radius = torch.sqrt(-2.0 * torch.log(_unit_interval(word0)))
    angle = (2.0 * math.pi) * _unit_interval(word1)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2)[..., :count]


def _unit_interval(words: Tensor) -> Tensor:
    """The upper 24 bits of each word, centred in their cell: never 0, never 1."""
    return ((torch.bitwise_right_shift(words, 8) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24


def _half(count: int) -> int:
    return (count + 1) // 2


def _signed32(step: int) -> int:
    if not 0 <= step < 2**32:
        raise ValueError(f"a stream's step must lie in 0..2**32-1, got {step}")
    return step - 2**32 if step >= 2**31 else step
