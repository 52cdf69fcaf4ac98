"""Metrics of attention patterns, per block, head and query token (arXiv 2402.02364, appendix on attention).

A pattern a (B, H, T, T) holds a[b, h, q, k], the weight that query token q gives to key token k <= q. Its rows sum to one.
Tokens count from 0: even ones are x, odd ones y. The last token, y_K, has no training signal. It is dropped as query and as
key, so T = 2K - 1 here. Every metric is averaged over the B sequences.

Shapes: B batch, H heads, T tokens, K examples.
"""

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from icl.analysis.data import AnalysisData
from icl.model import InContextRegressionTransformer, predict_with_activations

NEGLIGIBLE = 1e-3
"""A key with at most this weight counts as ignored in `hardness`."""


def attention_metrics(pattern: Tensor) -> dict[str, Tensor]:
    """Metrics of patterns (B, H, T, T), each (H, T).

    With q the query and E the mean over sequences:

    - entropy: E[-Σ_k a log2 a], bits; entropy_normalized: divided by log2(q + 1), the entropy of the uniform pattern
      (NaN for q = 0).
    - variability: E[½ Σ_k |a - E a|], the mean total variation distance to the average pattern. It is 0 if the pattern does not
      depend on the content, and near 1 if it depends on nothing else.
    - self_attn: E a[q, q]. prev_token_attn: E a[q, q-1] (0 for q = 0). first_token_attn: E a[q, 0], on the first x.
    - x_tokens_attn: E Σ_{k even} a. The y tokens' share is one minus it. prev_x_attn and prev_y_attn: on the nearest x or y
      before q (0 if there is none).
    - distance: E Σ_k (q - k) a, in tokens. key_position: E Σ_k k a / (q + 1), which the reference code calls "distance".
    - hardness: E[share of the q + 1 visible keys with a <= 1e-3].

    Raises:
        ValueError: `pattern` is not a (B, H, T, T) tensor.
    """
    if pattern.ndim != 4 or pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError(f"expected a pattern (B, H, T, T), got {tuple(pattern.shape)}")
    num = pattern.shape[-1]
    positions = torch.arange(num, device=pattern.device)
    visible = positions[None, :] <= positions[:, None]
    seen = (positions + 1).to(pattern.dtype)
    mean = pattern.mean(dim=0)
    entropy = -torch.special.xlogy(pattern, pattern).sum(dim=-1).mean(dim=0) / math.log(2.0)
    key_index = mean @ positions.to(pattern.dtype)
    parity = positions % 2
    # How far back the nearest x and y lie strictly before the query: before an x token, the nearest x is two tokens back.
    back_to_x, back_to_y = 2 - parity, 1 + parity
    return {
        "entropy": entropy,
        "entropy_normalized": torch.where(positions > 0, entropy / torch.log2(seen), torch.nan),
        "variability": (pattern - mean).abs().sum(dim=-1).mean(dim=0) / 2,
        "self_attn": mean.diagonal(dim1=-2, dim2=-1),
        "prev_token_attn": _at(mean, positions - 1),
        "first_token_attn": mean[..., 0],
        "prev_x_attn": _at(mean, positions - back_to_x),
        "prev_y_attn": _at(mean, positions - back_to_y),
        "x_tokens_attn": mean[..., 0::2].sum(dim=-1),
        "distance": positions - key_index,
        "key_position": key_index / seen,
        "hardness": ((pattern <= NEGLIGIBLE) & visible).to(pattern.dtype).mean(dim=0).sum(dim=-1) / seen,
    }


def attention_patterns(
    model: InContextRegressionTransformer, xs: Tensor, ys: Tensor, batch_size: int = 1024
) -> list[Tensor]:
    """Patterns (B, H, 2K-1, 2K-1) of every block on sequences xs (B, K, D), ys (B, K, 1), computed in batches."""
    parts: list[list[Tensor]] = [[] for _ in range(model.shape.num_layers)]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    with torch.no_grad():
        for batch_xs, batch_ys in zip(xs.split(batch_size), ys.split(batch_size), strict=True):
            _, cache = predict_with_activations(model.shape, parameters, batch_xs, batch_ys)
            for layer, collected in enumerate(parts):
                collected.append(cache[f"blocks.{layer}.attention.pattern"][..., :-1, :-1].clone())
    return [torch.cat(collected) for collected in parts]


def attention_table(
    model: InContextRegressionTransformer, xs: Tensor, ys: Tensor, batch_size: int = 1024
) -> pd.DataFrame:
    """One row per `block`, `head` and query `token` (all 0-based), one column per metric of `attention_metrics`."""
    parts = []
    for block, pattern in enumerate(attention_patterns(model, xs, ys, batch_size)):
        metrics = attention_metrics(pattern)
        heads, tokens = pattern.shape[1:3]
        keys = {"block": block, "head": np.repeat(np.arange(heads), tokens), "token": np.tile(np.arange(tokens), heads)}
        parts.append(
            pd.DataFrame(keys).assign(**{name: value.reshape(-1).cpu().numpy() for name, value in metrics.items()})
        )
    return pd.concat(parts, ignore_index=True)


def _at(mean: Tensor, keys: Tensor) -> Tensor:
    """mean[h, q, keys[q]] as (H, T), and 0 if the key would lie before the sequence."""
    gathered = mean.gather(-1, keys.clamp(min=0).expand(mean.shape[0], -1)[..., None]).squeeze(-1)
    return torch.where(keys >= 0, gathered, torch.zeros_like(gathered))


def measure_attention(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per block, head and query token: `attention_table` on the validation set."""
    return attention_table(model, data.validation.xs, data.validation.ys)
