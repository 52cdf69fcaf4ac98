"""Threefry words on the CPU: the bits of `icl.streams.threefry2x32` without its many tensors.

By the compiled loop of threefry.cpp, or by NumPy where there is no compiler: its calls cost a third of PyTorch's, and a
batch is small.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icl.native.build import NativeUnavailable, load_library

_SOURCE = Path(__file__).with_name("threefry.cpp")

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF


def threefry_words(key: tuple[int, int], step: int, count: int) -> Tensor:
    """The words of a key at counters (step, 0..count-1), int32 (2, count) on cpu."""
    function = _function()
    if function is None:
        return torch.from_numpy(_by_numpy(key, step, count).view(np.int32))
    words = torch.empty((2, count), dtype=torch.int32)
    function(key[0] & _WORD, key[1] & _WORD, step & _WORD, count, words.data_ptr())
    return words


def _by_numpy(key: tuple[int, int], step: int, count: int) -> np.ndarray:
    keys = (key[0] & _WORD, key[1] & _WORD, (key[0] ^ key[1] ^ _KEY_PARITY) & _WORD)
    x0, x1 = words = np.empty((2, count), dtype=np.uint32)
    x0[:] = (step + keys[0]) & _WORD
    x1[:] = np.arange(count, dtype=np.uint32)
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
def _function():
    try:
        function = load_library(_SOURCE, {}).threefry_words
    except NativeUnavailable:
        return None
    function.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    return function
