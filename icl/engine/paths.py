"""Loss and gradient of the transformer: one signature, and behind it whichever way is fastest here.

    (flat (P,), xs (B, K, D), ys (B, K, 1)) -> (token losses (K,), gradient (P,))

with token loss k = mean over the batch of (prediction_k - y_k)², and the gradient that of their mean over k, which is
the training loss.

Shapes: E ensemble members, B batch, K examples, D task dimension, P parameters.
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
"""Width of stream or MLP from which the native kernel does not win (benchmarks/speed/scaling.py; docs/speed.md): a tile of it
leaves the second-level cache, and compiling it takes longer than a short run."""


@dataclass(frozen=True)
class Path:
    """Which way computes loss and gradient, and why.

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
        native: "auto" takes the kernel where it can be built and wins, "never" does not, "require" insists.

    Raises:
        NativeUnavailable: `native="require"` and the kernel cannot be had.
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
        return refuse(f"at a width of {WIDE} and more the native kernel wins little over PyTorch")
    try:
        kernel = NativeTransformer(shape, threads or torch.get_num_threads())
    except NativeUnavailable as error:
        return refuse(str(error))

    def by_kernel(flat: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(flat, xs, ys) if flat.dtype == torch.float32 else by_torch(flat, xs, ys)

    def predict_by_kernel(flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        return (kernel.predict if flat.dtype == torch.float32 else predict_by_torch)(flat, xs, ys)

    return Path("native", f"compiled C++ kernel, {kernel.threads} thread(s)", by_kernel, predict_by_kernel)
