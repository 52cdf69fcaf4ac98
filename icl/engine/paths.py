"""Choosing how loss and gradient are computed: by a compiled kernel or by PyTorch, under the signatures of `icl.engine`.

Shapes: E members, B batch, K examples, D task dimension, P parameters.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from icl.engine.loss import batched_loss_and_grad, loss_and_grad
from icl.engine.native import NativeTransformer
from icl.engine.precision import MatmulPrecision, matmul_precision
from icl.model import TransformerShape, predict, unflatten
from icl.native.build import NativeUnavailable

LossAndGrad = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
BatchedLossAndGrad = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Native = Literal["auto", "never", "require"]

WIDE = 512
"""Width of residual stream or MLP from which the native kernel is not faster (benchmarks/speed/scaling.py; docs/speed.md). From there a
tile does not fit into the second-level cache, and compiling takes longer than a short run."""


@dataclass(frozen=True)
class Path:
    """How loss and gradient are computed, and why in this way.

    Attributes:
        name: "native" (compiled C++ kernel) or "torch".
        reason: one line for `icl doctor`.
        run: the callable itself.
        predict: (flat (P,), xs, ys) -> predictions (B, K, 1), without a gradient.
    """

    name: Literal["native", "torch"]
    reason: str
    run: LossAndGrad
    predict: Predict


def choose_path(
    shape: TransformerShape,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    native: Native = "auto",
    precision: MatmulPrecision = "highest",
) -> Path:
    """The fastest valid path for a model's shape on a device.

    Args:
        shape: of the model.
        device: where the tensors will be.
        threads: CPU threads for one call of the native kernel; torch's number of threads if None.
        native: "auto" uses the kernel if it can be built and is faster, "never" does not use it, and "require" raises
            an error if it cannot be used.
        precision: of matrix products. The native kernel has float32 alone.

    Raises:
        NativeUnavailable: `native="require"`, and the kernel cannot be used.
    """

    device = torch.device(device)

    def by_torch(flat: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        with matmul_precision(precision, device):
            return loss_and_grad(shape, flat, xs, ys)

    @torch.no_grad()
    def predict_by_torch(flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        with matmul_precision(precision, device):
            return predict(shape, unflatten(shape, flat), xs, ys)

    def refuse(reason: str) -> Path:
        if native == "require":
            raise NativeUnavailable(reason)
        return Path("torch", reason, by_torch, predict_by_torch)

    if native == "never":
        return refuse("the native kernel was not wanted")
    if precision != "highest":
        return refuse(f"the native kernel has no matmul_precision of {precision}")
    if device.type != "cpu":
        return refuse(f"the native kernel is for cpu, not {device}")
    if native == "auto" and max(shape.embed_size, shape.mlp_size) >= WIDE:
        return refuse(f"at a width of {WIDE} or more the native kernel is hardly faster than PyTorch")
    try:
        kernel = NativeTransformer(shape, threads or torch.get_num_threads())
    except NativeUnavailable as error:
        return refuse(str(error))

    def by_kernel(flat: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(flat, xs, ys) if flat.dtype == torch.float32 else by_torch(flat, xs, ys)

    def predict_by_kernel(flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        return (kernel.predict if flat.dtype == torch.float32 else predict_by_torch)(flat, xs, ys)

    return Path("native", f"compiled C++ kernel, {kernel.threads} thread(s)", by_kernel, predict_by_kernel)


def choose_batched(
    shape: TransformerShape, device: torch.device, precision: MatmulPrecision = "highest"
) -> tuple[str, BatchedLossAndGrad]:
    """The engine for many models at once: its name, and `icl.engine.loss.batched_loss_and_grad` of this shape.

    It is PyTorch. With ICL_FUSED=1 in the environment it is the kernel of `icl.engine.fused` instead, on cuda and for
    shapes that the kernel takes.
    """
    if device.type == "cuda" and os.environ.get("ICL_FUSED") == "1":
        from icl.engine.fused import fits, fused_loss_and_grad  # Triton is there only where PyTorch is made for cuda

        if fits(shape):
            return f"fused on cuda, products in {precision}", partial(fused_loss_and_grad, shape, precision=precision)

    def by_torch(flats: Tensor, xs: Tensor, ys: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with matmul_precision(precision, device):
            return batched_loss_and_grad(shape, flats, xs, ys, token_weights)

    return f"torch in batches on {device.type}", by_torch
