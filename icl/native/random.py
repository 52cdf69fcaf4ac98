"""Random words (32 bits) of the Threefry generator, and normal deviates, on the CPU.

The bits equal those of the PyTorch code in `icl.streams`, which makes many tensors and is slower. They come from the
compiled threefry.cpp, or from NumPy if there is no compiler. NumPy's calls cost a third of PyTorch's, which matters
because a batch is small.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icl.native.build import functions_of

_SOURCE = Path(__file__).with_name("threefry.cpp")

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF

PIECE = 2**15
"""Pairs of normal deviates made at a time."""


def threefry_words(key: tuple[int, int], step: int, count: int, start: int = 0) -> Tensor:
    """The random words of a key at the counters (step, start) to (step, start + count - 1): int32 (2, count) on cpu."""
    library = _library()
    if library is None:
        return torch.from_numpy(_by_numpy(key, step, count, start).view(np.int32))
    words = torch.empty((2, count), dtype=torch.int32)
    library.threefry_words(*(word & _WORD for word in (*key, step)), start, count, words.data_ptr())
    return words


def words_of(keys: Tensor, steps: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Both words of several keys (E, 2) at steps (S,) and counters 0..count - 1: int32 (E, S, count) each. None without a compiler."""
    library = _library()
    if library is None:
        return None
    keys, steps = keys.contiguous(), steps.to(torch.int32).contiguous()
    first, second = (torch.empty((len(keys), len(steps), count), dtype=torch.int32) for _ in range(2))
    library.threefry_many(
        len(keys), keys.data_ptr(), len(steps), steps.data_ptr(), count, first.data_ptr(), second.data_ptr()
    )
    return first, second


def fill_normals(key: tuple[int, int], step: int, out: Tensor, first: int = 0) -> bool:
    """Write N standard normal deviates of a key at a step, from number `first` on (even), into `out`, float32 (N,) on cpu.

    False without a compiler.

    The work is done in pieces that fit into the cache. Logarithms, roots, cosines and sines are PyTorch's, so that the last bits equal
    those of `icl.streams`.
    """
    library = _library()
    if library is None:
        return False
    most = min(PIECE, (len(out) + 1) // 2)
    uniform, sine, pairs = torch.empty(2 * most), torch.empty(most), torch.empty(2 * most if len(out) % 2 else 0)
    for start in range(0, len(out), 2 * most):
        target = out[start : start + 2 * most]
        count = (len(target) + 1) // 2
        whole = target if len(target) == 2 * count else pairs  # an odd length needs only half of the last pair
        radius, angle = uniform[:count], uniform[count : 2 * count]
        library.threefry_polar(
            *(word & _WORD for word in (*key, step)), (first + start) // 2, count, uniform.data_ptr()
        )
        radius.log_().mul_(-2.0).sqrt_()
        torch.sin(angle, out=sine[:count])
        angle.cos_()
        library.interleave(count, radius.data_ptr(), angle.data_ptr(), sine.data_ptr(), whole.data_ptr())
        if whole is pairs:
            target.copy_(pairs[: len(target)])
    return True


def _by_numpy(key: tuple[int, int], step: int, count: int, start: int) -> np.ndarray:
    keys = (key[0] & _WORD, key[1] & _WORD, (key[0] ^ key[1] ^ _KEY_PARITY) & _WORD)
    x0, x1 = words = np.empty((2, count), dtype=np.uint32)
    x0[:] = (step + keys[0]) & _WORD
    x1[:] = np.arange(start, start + count, dtype=np.uint32)
    x1 += np.uint32(keys[1])
    high = np.empty_like(x1)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 += x1
            np.left_shift(x1, rotation, out=high)
            np.right_shift(x1, 32 - rotation, out=x1)
            np.bitwise_or(x1, high, out=x1)
            np.bitwise_xor(x1, x0, out=x1)
        x0 += np.uint32(keys[(group + 1) % 3])
        x1 += np.uint32((keys[(group + 2) % 3] + group + 1) & _WORD)
    return words


@cache
def _library() -> ctypes.CDLL | None:
    words, number, place = [ctypes.c_uint32] * 3, ctypes.c_int64, ctypes.c_void_p
    arguments = {
        "threefry_words": [*words, number, number, place],
        "threefry_many": [number, place, number, place, number, place, place],
        "threefry_polar": [*words, number, number, place],
        "interleave": [number, place, place, place, place],
    }
    return functions_of(_SOURCE, arguments)
