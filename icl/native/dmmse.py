"""The posterior means of the dMMSE predictor, computed by the compiled dmmse.cpp.

Shapes: B batch, K examples, D task dimension, M tasks.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from icl.native.build import NativeUnavailable, load_library

_SOURCE = Path(__file__).with_name("dmmse.cpp")


def dmmse_weights(xs: Tensor, ys: Tensor, tasks: Tensor, threads: int = 1) -> Tensor | None:
    """Posterior mean of the task before each example, (B, K, D), given all examples before it.

    The prior is uniform over `tasks`, and an example's log-likelihood is -(y - w·x)².

    Args:
        xs, ys, tasks: (B, K, D), (B, K), (M, D), float32 on cpu, with at least one sequence and one task.
        threads: number of threads that share the sequences. The bits of the result do not depend on it.

    Returns:
        The means, or None if nothing can be compiled; the caller then computes them in PyTorch.
    """
    batch, examples, task_size = xs.shape
    function = _function(examples, task_size)
    if function is None:
        return None
    xs, ys, tasks = (tensor.detach().contiguous() for tensor in (xs, ys, tasks))
    means = torch.empty_like(xs)
    pointers = (tensor.data_ptr() for tensor in (xs, ys, tasks))
    function(*pointers, batch, len(tasks), threads, means.data_ptr())
    return means


@cache
def _function(examples: int, task_size: int):
    try:
        library = load_library(_SOURCE, {"NUM_EXAMPLES": examples, "TASK_SIZE": task_size})
    except NativeUnavailable:
        return None
    function = library.dmmse_weights
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    function.restype = None
    return function
