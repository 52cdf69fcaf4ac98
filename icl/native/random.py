"""Threefry words by the compiled loop of threefry.cpp: the bits of `icl.streams.threefry2x32`, many tensors fewer."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from icl.native.build import NativeUnavailable, load_library


def threefry_words(key: tuple[int, int], step: int, count: int) -> Tensor | None:
    """The words of a key at counters (step, 0..count-1), int32 (2, count) on cpu; None without a compiler."""
    function = _function()
    if function is None:
        return None
    words = torch.empty((2, count), dtype=torch.int32)
    function(key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF, step & 0xFFFFFFFF, count, words.data_ptr())
    return words


@cache
def _function():
    try:
        function = load_library("threefry.cpp", {}).threefry_words
    except NativeUnavailable:
        return None
    function.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    return function
