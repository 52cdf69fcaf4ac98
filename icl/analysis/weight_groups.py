"""Named groups of the transformer's weights, in order of depth: embeddings, attention heads, layer norms, MLP matrices,
unembedding.

A head is a set of rows of the joint qkv weight. With c = C/H, the q, k and v of head h are rows h·3c to (h+1)·3c.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icl.model import TransformerShape, parameter_layout


@dataclass(frozen=True)
class WeightGroup:
    """A contiguous part of the flat parameter vector.

    Attributes:
        name: such as "block_0/head_1". Layers, heads and norms count from 0.
        depth: (stage, part, index) for sorting. The stage is 0 for the embeddings, 1 + l for block l, and 1 + L for the end. In a
            block the part is 0 for the first norm, 1 for heads, 2 for the second norm, and 3 for the MLP.
        entries: its place in the flat vector.
        size: its shape as a matrix or vector.
    """

    name: str
    depth: tuple[int, int, int]
    entries: slice
    size: tuple[int, ...]


def weight_groups(shape: TransformerShape) -> list[WeightGroup]:
    """All weight matrices (each head as its own group) and all norm gains. Biases and the output projections of attention are
    left out, as in the reference code."""
    layout = parameter_layout(shape)

    def whole(name: str, parameter: str, depth: tuple[int, int, int]) -> WeightGroup:
        offset, size = layout[parameter]
        return WeightGroup(name, depth, slice(offset, offset + int(np.prod(size))), size)

    groups = [
        whole("embed/token", "token_embedding.weight", (0, 0, 0)),
        whole("embed/position", "position_embedding.weight", (0, 1, 0)),
    ]
    for layer in range(shape.num_layers):
        prefix, block = f"blocks.{layer}", f"block_{layer}"
        groups += [head_group(shape, layer, head) for head in range(shape.num_heads)]
        for index, matrix in enumerate(("up", "down")):
            groups.append(whole(f"{block}/mlp_{index}", f"{prefix}.mlp.{matrix}.weight", (1 + layer, 3, index)))
        if shape.layer_norm:
            for index, norm in enumerate(("attention_norm", "mlp_norm")):
                groups.append(whole(f"{block}/norm_{index}", f"{prefix}.{norm}.weight", (1 + layer, 2 * index, 0)))
    end = 1 + shape.num_layers
    if shape.layer_norm:
        groups.append(whole("unembed/norm", "final_norm.weight", (end, 0, 0)))
    groups.append(whole("unembed/linear", "unembedding.weight", (end, 1, 0)))
    return sorted(groups, key=lambda group: group.depth)


def head_group(shape: TransformerShape, layer: int, head: int) -> WeightGroup:
    """The query, key and value rows (3c, C) of one head.

    Raises:
        ValueError: there is no such layer or head.
    """
    if not (0 <= layer < shape.num_layers and 0 <= head < shape.num_heads):
        raise ValueError(
            f"no head {head} in layer {layer}: the model has {shape.num_layers} layers of {shape.num_heads} heads"
        )
    offset, (_, channels) = parameter_layout(shape)[f"blocks.{layer}.attention.qkv.weight"]
    rows = 3 * channels // shape.num_heads
    start = offset + head * rows * channels
    return WeightGroup(
        f"block_{layer}/head_{head}", (1 + layer, 1, head), slice(start, start + rows * channels), (rows, channels)
    )


def standard_pairs(shape: TransformerShape) -> list[tuple[WeightGroup, WeightGroup]]:
    """The pairs of groups whose covariance is computed: each group with itself, heads of neighbouring blocks, and the two MLP
    matrices of a block."""
    groups = weight_groups(shape)
    by_name: Mapping[str, WeightGroup] = {group.name: group for group in groups}
    pairs = [(group, group) for group in groups]
    for layer in range(shape.num_layers):
        pairs.append((by_name[f"block_{layer}/mlp_0"], by_name[f"block_{layer}/mlp_1"]))
        if layer + 1 < shape.num_layers:
            for left in range(shape.num_heads):
                for right in range(shape.num_heads):
                    pairs.append((head_group(shape, layer, left), head_group(shape, layer + 1, right)))
    return pairs


def entries_of(draws: NDArray[np.floating], group: WeightGroup) -> NDArray[np.floating]:
    """The group's columns of flat draws (..., P)."""
    return draws[..., group.entries]
