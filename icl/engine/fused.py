"""Loss and gradient of many transformers at once as one Triton kernel, for CUDA.

PyTorch launches some three hundred kernels for a step of this small model, and every one reads and writes all activations.
Here one program takes a tile of whole sequences through the model and back. Activations stay on the multiprocessor, or in
a scratch memory that its caches hold.

Rows of a tile are tokens: row r is token r % TOKENS of sequence r // TOKENS. A tile attends within itself, under a mask that
keeps sequences apart. Each member's batch is shared out among SLOTS programs. A program adds the gradients of its tiles to
its own slot, and the slots are summed in order. So two runs give equal bits.

The arithmetic is float32; `precision` says how products are taken (`icl.engine.precision`).

Shapes: E members, B batch, K examples, D task dimension, P parameters; R rows of a tile, C channels, F MLP width, H heads of
width W, L layers.
"""

# The kernel is Triton, whose types differ from Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from icl.engine.precision import MatmulPrecision
from icl.model import TransformerShape, parameter_layout

PROGRAMS = 264
"""Programs of one launch: two for each multiprocessor of an H100. It decides the order of sums, so it is the same on every card."""
ROWS = 32
"""Rows of a tile, or more if a sequence has more tokens. A tile of 64 no longer fits into registers (ptxas for sm_90: 2.7 kB of spills per
thread, against none)."""
WARPS = 8
PRODUCTS = {"highest": "ieee", "tf32x3": "tf32x3", "tf32": "tf32"}
LONGEST = 64
"""Most tokens of a sequence."""


def fits(shape: TransformerShape) -> bool:
    """Whether the kernel takes this shape: powers of two, heads at least 16 wide, sequences of at most LONGEST tokens."""
    width = shape.embed_size // shape.num_heads
    powers = all(size & (size - 1) == 0 for size in (shape.embed_size, shape.mlp_size, width))
    small = max(shape.embed_size, shape.mlp_size) <= 128 and 2 * shape.max_examples <= LONGEST
    return powers and small and width >= 16 and shape.mlp_size >= 16


def fused_loss_and_grad(
    shape: TransformerShape,
    flats: Tensor,
    xs: Tensor,
    ys: Tensor,
    token_weights: Tensor | None = None,
    precision: MatmulPrecision = "highest",
) -> tuple[Tensor, Tensor]:
    """E models at once: flats (E, P), xs (E, B, K, D), ys (E, B, K, 1) -> token losses (E, K), gradients (E, P).

    Args:
        shape: of the models; `fits(shape)` must hold.
        flats, xs, ys: float32. Data without the axis of members, (B, K, D) and (B, K, 1), are the same for all.
        token_weights: (K,) the gradient is that of the losses' weighted sum; None: of their mean.
        precision: of products.
    """
    members, size = flats.shape
    shared = xs.ndim == 3
    *_, batch, examples, task_size = xs.shape
    flats, xs, ys = flats.contiguous(), xs.contiguous(), ys.contiguous()
    tokens = 1 << (2 * examples - 1).bit_length()
    rows = max(ROWS, tokens)
    tiles = math.ceil(batch / (rows // tokens))
    slots = max(1, min(tiles, PROGRAMS // members))
    if token_weights is None:
        token_weights = torch.full((examples,), 1 / examples, device=flats.device)
    scratch = torch.empty(members, slots, 2 * shape.num_layers, rows * shape.embed_size, device=flats.device)
    gradients = torch.zeros(members, slots, size, device=flats.device)
    losses = torch.zeros(members, slots, examples, device=flats.device)
    with torch.cuda.device_of(flats):  # Triton launches on the current GPU, wherever the tensors are
        _kernel[(slots, members)](
            flats, xs, ys, token_weights, scratch, gradients, losses, batch, tiles, slots,
            0 if shared else batch * examples * task_size, 0 if shared else batch * examples,
            **_sizes(shape), K=examples, TOKENS=tokens, R=rows, PRECISION=PRODUCTS[precision], num_warps=WARPS,
        )  # fmt: skip
    return losses.sum(dim=1), gradients.sum(dim=1)


def _sizes(shape: TransformerShape) -> dict[str, Any]:
    """The constants of a shape that the kernel is compiled for. Offsets within a block are the same in every block."""
    at = {name: offset for name, (offset, _) in parameter_layout(shape).items()}
    first = min(offset for name, offset in at.items() if name.startswith("blocks.0."))
    after = at.get("blocks.1.attention_norm.weight", at.get("blocks.1.attention.qkv.weight", 0))

    def within(name: str) -> int:
        return at.get(f"blocks.0.{name}", first) - first

    return {
        "P": shape.num_parameters, "D": shape.task_size, "C": shape.embed_size, "F": shape.mlp_size, "H": shape.num_heads,
        "W": shape.embed_size // shape.num_heads, "L": shape.num_layers, "PLACES": 2 * shape.max_examples,
        "NORM": shape.layer_norm, "OUTPUT": shape.include_output, "DOUBLED": shape.residual == "doubled",
        "POSITIONS": at["position_embedding.weight"], "BLOCKS": first, "BLOCK": after - first,
        "QKV": within("attention.qkv.weight"), "OUT": within("attention.output.weight"), "MLP_NORM": within("mlp_norm.weight"),
        "UP": within("mlp.up.weight"), "UP_BIAS": within("mlp.up.bias"), "DOWN": within("mlp.down.weight"),
        "DOWN_BIAS": within("mlp.down.bias"), "FINAL_NORM": at.get("final_norm.weight", 0), "HEAD": at["unembedding.weight"],
        "HEAD_BIAS": at["unembedding.bias"],
    }  # fmt: skip


@triton.jit
def _add(place, value):
    tl.store(place, tl.load(place) + value)


@triton.jit
def _normed(stream, gain, C: tl.constexpr, NORM: tl.constexpr):
    """Layer norm: rows before gain and bias, the reciprocal of their deviation, rows after. The bias follows the gain."""
    channel = tl.arange(0, C)
    if NORM:
        centred = stream - (tl.sum(stream, 1) / C)[:, None]
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + 1e-5)
        rows = centred * scale[:, None]
        return rows, scale, rows * tl.load(gain + channel)[None, :] + tl.load(gain + C + channel)[None, :]
    else:
        return stream, tl.sum(stream, 1), stream


@triton.jit
def _norm_back(grad, rows, scale, gain, to, C: tl.constexpr, NORM: tl.constexpr):
    """The gradient before layer norm of one after it; those of gain and bias are added at `to`."""
    channel = tl.arange(0, C)
    if NORM:
        _add(to + channel, tl.sum(grad * rows, 0))
        _add(to + C + channel, tl.sum(grad, 0))
        grad = grad * tl.load(gain + channel)[None, :]
        return scale[:, None] * (grad - (tl.sum(grad, 1) / C)[:, None] - rows * (tl.sum(grad * rows, 1) / C)[:, None])
    else:
        return grad


@triton.jit
def _pattern(queries, keys, mask, PRECISION: tl.constexpr):
    scores = tl.where(mask, tl.dot(queries, tl.trans(keys), input_precision=PRECISION), float("-inf"))
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _kernel(
    flats, all_xs, all_ys, token_weights, all_scratch, all_gradients, all_losses, batch, tiles, slots, xs_stride, ys_stride,
    P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr,
    PLACES: tl.constexpr, NORM: tl.constexpr, OUTPUT: tl.constexpr, DOUBLED: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, QKV: tl.constexpr, OUT: tl.constexpr, MLP_NORM: tl.constexpr, UP: tl.constexpr,
    UP_BIAS: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, FINAL_NORM: tl.constexpr, HEAD: tl.constexpr,
    HEAD_BIAS: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    w, g = flats + member * P, all_gradients + (member * slots + slot) * P
    xs, ys, losses = all_xs + member * xs_stride, all_ys + member * ys_stride, all_losses + (member * slots + slot) * K
    row, channel, hidden, within = tl.arange(0, R), tl.arange(0, C), tl.arange(0, F), tl.arange(0, W)
    token = row % TOKENS
    example, is_x = token // 2, token % 2 == 0
    real = token < 2 * K
    mask = (row[:, None] // TOKENS == row[None, :] // TOKENS) & (token[None, :] <= token[:, None]) & real[None, :]
    tile_rows = row[:, None] * C + channel[None, :]
    saved = all_scratch + (member * slots + slot) * (2 * L * R * C) + tile_rows
    root: tl.constexpr = W**-0.5

    for tile in range(slot, tiles, slots):
        sequence = tile * (R // TOKENS) + row // TOKENS
        valid = real & (sequence < batch)
        place = sequence * K + example
        target = tl.load(ys + place, mask=valid, other=0.0)

        # Embedding: a token is its features (y, x_1, ..., x_D) times their columns, and its position's column.
        stream = tl.load(w + POSITIONS + channel[None, :] * PLACES + token[:, None], mask=real[:, None], other=0.0)
        stream += tl.where(is_x, 0.0, target)[:, None] * tl.load(w + channel * (D + 1))[None, :]
        for d in tl.static_range(D):
            x = tl.load(xs + place * D + d, mask=valid & is_x, other=0.0)
            stream += x[:, None] * tl.load(w + channel * (D + 1) + d + 1)[None, :]

        for layer in range(L):
            b = w + BLOCKS + layer * BLOCK
            tl.store(saved + (2 * layer) * (R * C), stream)
            _, _, normed = _normed(stream, b, C, NORM)
            middle = stream
            for head in range(H):
                rows = (head * 3 * W + within)[None, :] * C + channel[:, None]  # (C, W): transposed
                queries = tl.dot(normed, tl.load(b + QKV + rows), input_precision=PRECISION) * root
                keys = tl.dot(normed, tl.load(b + QKV + W * C + rows), input_precision=PRECISION)
                values = tl.dot(normed, tl.load(b + QKV + 2 * W * C + rows), input_precision=PRECISION)
                attended = tl.dot(_pattern(queries, keys, mask, PRECISION), values, input_precision=PRECISION)
                if OUTPUT:
                    out = tl.load(b + OUT + channel[None, :] * C + (head * W + within)[:, None])
                else:
                    out = tl.where(channel[None, :] == (head * W + within)[:, None], 1.0, 0.0)
                middle += tl.dot(attended, out, input_precision=PRECISION)
            tl.store(saved + (2 * layer + 1) * (R * C), middle)
            _, _, normed = _normed(middle, b + MLP_NORM, C, NORM)
            units = tl.dot(normed, tl.load(b + UP + hidden[None, :] * C + channel[:, None]), input_precision=PRECISION)
            units = tl.maximum(units + tl.load(b + UP_BIAS + hidden)[None, :], 0.0)
            down = tl.load(b + DOWN + channel[None, :] * F + hidden[:, None])
            out = middle + tl.dot(units, down, input_precision=PRECISION) + tl.load(b + DOWN_BIAS + channel)[None, :]
            stream = stream + out if DOUBLED else out

        rows, scale, normed = _normed(stream, w + FINAL_NORM, C, NORM)
        head_row = tl.load(w + HEAD + channel)
        error = tl.sum(normed * head_row[None, :], 1) + tl.load(w + HEAD_BIAS) - target
        error = tl.where(valid & is_x, error, 0.0)
        for k in tl.static_range(K):
            _add(losses + k, tl.sum(tl.where(example == k, error * error, 0.0), 0) / batch)

        d_prediction = error * tl.load(token_weights + example, mask=real, other=0.0) * (2.0 / batch)
        _add(g + HEAD + channel, tl.sum(normed * d_prediction[:, None], 0))
        _add(g + HEAD_BIAS, tl.sum(d_prediction, 0))
        grad = _norm_back(
            d_prediction[:, None] * head_row[None, :], rows, scale, w + FINAL_NORM, g + FINAL_NORM, C, NORM
        )
        tl.debug_barrier()  # what was saved is read by other threads than those that wrote it

        for backwards in range(L):
            layer = L - 1 - backwards
            b, to = w + BLOCKS + layer * BLOCK, g + BLOCKS + layer * BLOCK
            middle = tl.load(saved + (2 * layer + 1) * (R * C))
            rows, scale, normed = _normed(middle, b + MLP_NORM, C, NORM)
            up = tl.load(b + UP + hidden[:, None] * C + channel[None, :])
            units = tl.dot(normed, tl.trans(up), input_precision=PRECISION)
            units = tl.maximum(units + tl.load(b + UP_BIAS + hidden)[None, :], 0.0)
            _add(to + DOWN_BIAS + channel, tl.sum(grad, 0))
            down = channel[:, None] * F + hidden[None, :]
            _add(to + DOWN + down, tl.dot(tl.trans(grad), units, input_precision=PRECISION))
            d_units = tl.dot(grad, tl.load(b + DOWN + down), input_precision=PRECISION)
            d_units = tl.where(units > 0, d_units, 0.0)
            _add(to + UP_BIAS + hidden, tl.sum(d_units, 0))
            _add(
                to + UP + hidden[:, None] * C + channel[None, :],
                tl.dot(tl.trans(d_units), normed, input_precision=PRECISION),
            )
            d_normed = tl.dot(d_units, up, input_precision=PRECISION)
            d_middle = grad + _norm_back(d_normed, rows, scale, b + MLP_NORM, to + MLP_NORM, C, NORM)
            grad = grad + d_middle if DOUBLED else d_middle

            rows, scale, normed = _normed(tl.load(saved + (2 * layer) * (R * C)), b, C, NORM)
            d_normed = tl.zeros((R, C), tl.float32)
            for head in range(H):
                qkv = (head * 3 * W + within)[:, None] * C + channel[None, :]  # (W, C)
                to_queries, to_keys = tl.load(b + QKV + qkv), tl.load(b + QKV + W * C + qkv)
                to_values = tl.load(b + QKV + 2 * W * C + qkv)
                queries = tl.dot(normed, tl.trans(to_queries), input_precision=PRECISION) * root
                keys = tl.dot(normed, tl.trans(to_keys), input_precision=PRECISION)
                values = tl.dot(normed, tl.trans(to_values), input_precision=PRECISION)
                pattern = _pattern(queries, keys, mask, PRECISION)
                columns = channel[:, None] * C + (head * W + within)[None, :]  # (C, W)
                if OUTPUT:
                    out = tl.load(b + OUT + columns)
                    attended = tl.dot(pattern, values, input_precision=PRECISION)
                    _add(to + OUT + columns, tl.dot(tl.trans(d_middle), attended, input_precision=PRECISION))
                else:
                    out = tl.where(channel[:, None] == (head * W + within)[None, :], 1.0, 0.0)
                d_attended = tl.dot(d_middle, out, input_precision=PRECISION)
                d_values = tl.dot(tl.trans(pattern), d_attended, input_precision=PRECISION)
                d_scores = tl.dot(d_attended, tl.trans(values), input_precision=PRECISION)
                d_scores = pattern * (d_scores - tl.sum(d_scores * pattern, 1)[:, None])
                d_queries = tl.dot(d_scores, keys, input_precision=PRECISION) * root
                d_keys = tl.dot(tl.trans(d_scores), queries, input_precision=PRECISION)
                _add(to + QKV + qkv, tl.dot(tl.trans(d_queries), normed, input_precision=PRECISION))
                _add(to + QKV + W * C + qkv, tl.dot(tl.trans(d_keys), normed, input_precision=PRECISION))
                _add(to + QKV + 2 * W * C + qkv, tl.dot(tl.trans(d_values), normed, input_precision=PRECISION))
                d_normed += tl.dot(d_queries, to_queries, input_precision=PRECISION)
                d_normed += tl.dot(d_keys, to_keys, input_precision=PRECISION)
                d_normed += tl.dot(d_values, to_values, input_precision=PRECISION)
            grad += _norm_back(d_normed, rows, scale, b, to, C, NORM)

        for d in tl.static_range(D):
            x = tl.load(xs + place * D + d, mask=valid & is_x, other=0.0)
            _add(g + channel * (D + 1) + d + 1, tl.sum(grad * x[:, None], 0))
        _add(g + channel * (D + 1), tl.sum(grad * tl.where(is_x, 0.0, target)[:, None], 0))
        of_token = tl.sum(tl.reshape(grad, (R // TOKENS, TOKENS, C)), 0)
        position = tl.arange(0, TOKENS)[:, None]
        places = g + POSITIONS + channel[None, :] * PLACES + position
        tl.store(places, tl.load(places, mask=position < 2 * K) + of_token, mask=position < 2 * K)
        tl.debug_barrier()  # before the next tile overwrites what was saved
