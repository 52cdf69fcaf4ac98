"""The noise of chains, made in blocks."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from icl.streams import Stream, keys_of, normals

NOISE_BLOCK = 2**17
"""Normal deviates per block. The generator makes some hundred calls however many they are, and larger blocks do not fit into the cache."""


NOISE_BLOCK_ON_ACCELERATOR = 2**25


NOISE = "chain/noise"
"""The purpose of the stream of a chain's noise."""


CHAIN_BITS = 20
"""With `noise_law` "independent", chain c of a run has the seed init_seed · 2^20 + c."""


LONG = 8192
"""The noise of chains with more parameters than this is made chain by chain, by the compiled generator if there is one.

The bits are the same.
"""


def chain_seeds(seed: int, chains: int, law: Literal["independent", "sequential"]) -> list[int]:
    """The seeds of a run's chains.

    "independent": the seed depends on the run's seed and the chain's number, and no two runs with different seeds share a chain.
    "sequential": chain c has the seed `seed` + c, as in older tables; runs with neighbouring seeds then share all chains but one.
    For seed 0 both are equal.
    """
    first = seed << CHAIN_BITS if law == "independent" else seed
    return list(range(first, first + chains))


def noise_blocks(
    seeds: Sequence[int], steps: int, like: Tensor, purpose: str = NOISE, first: int = 0
) -> Iterator[Tensor]:
    """Standard normal (E, P) for steps first, first + 1, ..., made in blocks; chain i's are those of `Stream(seeds[i], purpose)`."""
    streams = [Stream(seed, purpose) for seed in seeds]
    if like.shape[1] > LONG and like.device.type == "cpu":
        for step in range(first, steps):
            yield _filled(streams, step, like)  # not held by a name, so that a generator that waits holds no noise
        return
    keys = keys_of(streams, like.device)
    block = max(1, min(steps, _block_size(like.device) // like.numel()))
    for start in range(first, steps, block):
        numbers = torch.arange(start, min(start + block, steps)).to(like.device)
        yield from normals(keys, numbers, like.shape[1]).to(like.dtype).unbind(dim=1)


def _filled(streams: Sequence[Stream], step: int, like: Tensor) -> Tensor:
    noise = torch.empty(like.shape)
    for stream, own in zip(streams, noise, strict=True):
        stream.fill_normal(step, own)
    return noise.to(like.dtype)


def shared_noise_blocks(seeds: Sequence[int], steps: int, like: Tensor, first: int = 0) -> Iterator[Tensor]:
    """`noise_blocks` for chains of several models, in which equal seeds occur more than once. Their noise is made once."""
    own = list(dict.fromkeys(seeds))
    blocks = noise_blocks(own, steps, like[: len(own)], first=first)
    if len(own) == len(seeds):
        return blocks
    place = torch.tensor([own.index(seed) for seed in seeds], device=like.device)
    return (noise[place] for noise in blocks)


def _block_size(device: torch.device) -> int:
    if device.type == "xla":
        return 1  # the index of a step in a block would become part of its graph
    return NOISE_BLOCK if device.type == "cpu" else NOISE_BLOCK_ON_ACCELERATOR
