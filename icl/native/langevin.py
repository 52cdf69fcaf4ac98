"""One step of the underdamped Langevin kernel on the CPU, compiled: one pass in place of a dozen.

Shapes: E chains, P coordinates.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from icl.native.build import functions_of

_SOURCE = Path(__file__).with_name("langevin.cpp")


def langevin_step(
    constants: tuple[float, float, float],
    of_chains: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, ...],
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The new positions and momenta (E, P), with the bits of `icl.sampling.langevin.step`; None where it must be done by PyTorch.

    Args:
        constants: nβ, γ and the weight decay.
        of_chains: h, exp(−ηh) and √(1 − exp(−2ηh)) s, each (E, 1).
        tensors: positions, anchors, gradients, noise and momenta, each (E, P).
        out: where to write the results; the old positions and momenta are allowed. None: new tensors.
    """
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in tensors):
        return None
    if any(each.ndim != 2 or each.stride(1) != 1 for each in tensors):
        return None
    library = _library()
    if library is None:
        return None
    chains, count = tensors[0].shape
    results = (torch.empty(chains, count), torch.empty(chains, count)) if out is None else out
    rows = [each.contiguous() for each in of_chains]
    places = [number for each in (*tensors, *results) for number in (each.data_ptr(), each.stride(0))]
    library.langevin_step(chains, count, *constants, *(each.data_ptr() for each in rows), *places)
    return results


@cache
def _library() -> ctypes.CDLL | None:
    number, place = ctypes.c_int64, ctypes.c_void_p
    arguments = [number, number, *[ctypes.c_float] * 3, *[place] * 3, *[place, number] * 7]
    return functions_of(_SOURCE, {"langevin_step": arguments})
