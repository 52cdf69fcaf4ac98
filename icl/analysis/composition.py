"""K-composition: how much the keys of one head read of what an earlier head writes.

Shapes: L blocks, H heads, C channels, D width of a head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def k_composition(weights: Mapping[str, Tensor], early: int = 0, late: int = 1) -> Tensor:
    """(H, H) K-composition of each head of block `early` (rows) with each head of block `late` (columns).

    It is ‖W_V W_O · W_K W_Qᵀ‖ / (‖W_V W_O‖ ‖W_K W_Qᵀ‖) in Frobenius norms. W_V and W_O are the early head's, W_K and W_Q the late head's
    (Elhage et al. 2021, "A mathematical framework for transformer circuits", there for column vectors). It lies between 0 and 1, and is
    0 for a head whose weights are zero. Layer norms are left out.

    Args:
        weights: the model's weights by their public names (`icl.subjects.language`).
        early, late: numbers of the two blocks.

    Raises:
        ValueError: a block does not exist, or `early` is not before `late`.
    """
    if not early < late:
        raise ValueError(f"`early` must be a block before `late`, got {early} and {late}")
    for block in (early, late):
        if f"blocks.{block}.attn.W_V" not in weights:
            raise ValueError(f"the weights have no block {block}; blocks count from 0")
    value, output = (weights[f"blocks.{early}.attn.W_{kind}"].detach().double() for kind in "VO")
    key, query = (weights[f"blocks.{late}.attn.W_{kind}"].detach().double() for kind in "KQ")
    written = value @ output  # (H, C, C)
    read = key @ query.transpose(1, 2)
    product = torch.linalg.matrix_norm(written[:, None] @ read[None])
    sizes = torch.linalg.matrix_norm(written)[:, None] * torch.linalg.matrix_norm(read)[None]
    return product / sizes.clamp(min=torch.finfo(torch.double).tiny)
