"""Long vectors in pieces that stay in the processor's cache, so that each number comes from memory once and temporaries are short."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

PIECE = 2**18
"""Numbers of a piece on a CPU. An even number, because random numbers are made in pairs."""

WHOLE = slice(None)


def pieces(like: Tensor) -> Iterator[slice]:
    """The places of the last dimension of a tensor, piece by piece; on an accelerator in one piece."""
    count = like.shape[-1]
    width = PIECE if like.device.type == "cpu" else count
    return (slice(start, min(start + width, count)) for start in range(0, count, width))


def added(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums over pieces of named sums, added in float64. A single piece's are returned as they are."""
    whole = list(parts)
    if len(whole) == 1:
        return dict(whole[0])
    return {
        name: torch.stack([part[name] for part in whole]).double().sum(dim=0).to(value)
        for name, value in whole[0].items()
    }
