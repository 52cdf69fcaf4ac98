"""The transformer's loss, gradient and predictions, computed by the compiled kernel.cpp.

Shapes: B batch, K examples, D task dimension, P parameters.
"""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from icl.model import TransformerShape
from icl.native.build import NativeUnavailable, load_library

_SOURCE = Path(__file__).with_name("kernel.cpp")
_ALIGNMENT = 64


class NativeTransformer:
    """Callable (flat (P,), xs (B, K, D), ys (B, K, 1)) -> (token losses (K,), gradient of their mean (P,)).

    It works in float32 on the CPU and equals `icl.engine.loss.loss_and_grad` to rounding. The bits of the result do not
    depend on `threads`. One object may be called from several Python threads at once.

    Args:
        shape: of the model. Each shape is compiled once and cached.
        threads: number of threads that share a batch.

    Raises:
        NativeUnavailable: there is no compiler, it failed, or ICL_NATIVE=0 is set.
    """

    def __init__(self, shape: TransformerShape, threads: int = 1) -> None:
        self.shape, self.threads = shape, threads
        library = load_library(
            _SOURCE,
            {
                "TASK_SIZE": shape.task_size,
                "MAX_EXAMPLES": shape.max_examples,
                "EMBED_SIZE": shape.embed_size,
                "MLP_SIZE": shape.mlp_size,
                "NUM_HEADS": shape.num_heads,
                "NUM_LAYERS": shape.num_layers,
                "LAYER_NORM": int(shape.layer_norm),
                "INCLUDE_OUTPUT": int(shape.include_output),
                "RESIDUAL_DOUBLED": int(shape.residual == "doubled"),
            },
        )
        library.parameter_count.restype = library.workspace_size.restype = ctypes.c_int64
        if library.parameter_count() != shape.num_parameters:
            raise NativeUnavailable("the kernel's parameter layout differs from the model's")
        self._size = library.workspace_size(threads) + _ALIGNMENT
        self._loss_and_grad, self._predictions = library.loss_and_grad, library.predictions
        pointer = ctypes.c_void_p
        shared = [pointer] * 3 + [ctypes.c_int64, ctypes.c_int, ctypes.c_int, pointer]
        self._loss_and_grad.argtypes, self._predictions.argtypes = [*shared, pointer, pointer], [*shared, pointer]
        self._loss_and_grad.restype = self._predictions.restype = None
        self._local = threading.local()

    def __call__(self, flat: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = torch.empty(xs.shape[1]), torch.empty_like(flat.detach())
        self._call(self._loss_and_grad, flat, xs, ys, losses, gradient)
        return losses, gradient

    def predict(self, flat: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        """Predictions (B, K, 1), equal to `icl.model.predict` to rounding."""
        predictions = torch.empty(*xs.shape[:2], 1)
        self._call(self._predictions, flat, xs, ys, predictions)
        return predictions

    def _call(self, function: Callable[..., None], flat: Tensor, xs: Tensor, ys: Tensor, *results: Tensor) -> None:
        flat, xs, ys = (tensor.detach().contiguous() for tensor in (flat, xs, ys))
        batch, examples, task_size = xs.shape
        fits = task_size == self.shape.task_size and 1 <= examples <= self.shape.max_examples
        if not fits or batch < 1 or ys.shape != (batch, examples, 1) or flat.shape != (self.shape.num_parameters,):
            raise ValueError(
                f"expected flat ({self.shape.num_parameters},), xs (B, K, {self.shape.task_size}) and ys (B, K, 1), "
                f"K <= {self.shape.max_examples}; got {tuple(flat.shape)}, {tuple(xs.shape)} and {tuple(ys.shape)}"
            )
        for tensor in (flat, xs, ys):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise ValueError(f"the native kernel needs float32 on cpu, got {tensor.dtype} on {tensor.device}")
        function(
            flat.data_ptr(), xs.data_ptr(), ys.data_ptr(), batch, examples, self.threads,
            self._workspace(), *(result.data_ptr() for result in results),
        )  # fmt: skip

    def _workspace(self) -> int:
        """Address of this Python thread's scratch memory, kept between calls."""
        if not hasattr(self._local, "workspace"):
            self._local.workspace = torch.empty(self._size, dtype=torch.uint8)
        address = self._local.workspace.data_ptr()
        return address + -address % _ALIGNMENT
