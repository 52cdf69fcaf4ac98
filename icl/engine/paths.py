"""Choosing how loss and gradient are computed: by the compiled kernel or by PyTorch, under the signature of `icl.engine`.

Shapes: B batch, K examples, D task dimension, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from icl.engine.loss import loss_and_grad
from icl.engine.native import NativeTransformer
from icl.model import TransformerShape, predict, unflatten
from icl.native.build import NativeUnavailable

LossAndGrad = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
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
    shape: TransformerShape, device: torch.device | str = "cpu", threads: int | None = None, native: Native = "auto"
) -> Path:
    """The fastest valid path for a model's shape on a device.

    Args:
        shape: of the model.
        device: where the tensors will be.
        threads: CPU threads for one call of the native kernel; torch's number of threads if None.
        native: "auto" uses the kernel if it can be built and is faster, "never" does not use it, and "require" raises
            an error if it cannot be used.

    Raises:
        NativeUnavailable: `native="require"`, and the kernel cannot be used.
    """

    def by_torch(flat: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_grad(shape, flat, xs, ys)

    @torch.no_grad()
    def predict_by_torch(flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        return predict(shape, unflatten(shape, flat), xs, ys)

    def refuse(reason: str) -> Path:
        if native == "require":
            raise NativeUnavailable(reason)
        return Path("torch", reason, by_torch, predict_by_torch)

    if native == "never":
        return refuse("the native kernel was not wanted")
    if torch.device(device).type != "cpu":
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
