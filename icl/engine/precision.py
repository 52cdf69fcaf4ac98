"""How exactly products of float32 matrices are taken: `matmul_precision`.

Tensor cores multiply numbers of 10 fraction bits (TF32) where float32 has 23. They are several times as fast. Three settings:

- highest: float32. This is the default, also for convolutions, which PyTorch by itself takes in TF32 on a GPU.
- tf32: every factor is rounded to TF32. The relative error of a product is about 2^-11.
- tf32x3: every factor is split into a TF32 number and the TF32 remainder, a = a₁ + a₂. With a b ≈ a₁ b₁ + (a₁ b₂ + a₂ b₁) the
  relative error is about 2^-21, near that of float32, at a third of TF32's speed. (The split is that of Ootomo & Yokota, arXiv
  2203.03341, without their scaling.)

Sums are float32 in all three. On devices without tensor cores the same roundings are made in float32, slowly, so that a
setting means the same numbers everywhere, up to the order of sums.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MatmulPrecision = Literal["highest", "tf32x3", "tf32"]

TF32_EPSILON = 2.0**-10
"""Distance from 1 to the next TF32 number."""

_aten = torch.ops.aten
_PRODUCTS: set[Any] = {_aten.mm.default, _aten.bmm.default}
_SUMS_WITH_PRODUCT: dict[Any, Any] = {_aten.addmm.default: _aten.mm.default, _aten.baddbmm.default: _aten.bmm.default}


def to_tf32(values: Tensor) -> Tensor:
    """Float32 numbers rounded to the nearest of 10 fraction bits; ties go away from zero, as in the tensor cores' own conversion."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextmanager
def matmul_precision(precision: MatmulPrecision, device: torch.device) -> Iterator[None]:
    """Within it, products of float32 matrices on the device, and their gradients, are taken in this precision.

    On cuda it also holds off what the process has allowed elsewhere: "highest" is float32 whatever was set before.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_tensor_cores(precision))
        if precision != "highest":
            stack.enter_context(_Rounded(precision))
        yield


@contextmanager
def _tensor_cores(precision: MatmulPrecision) -> Iterator[None]:
    """PyTorch's own switches for products and convolutions on cuda."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # pyright: ignore[reportAttributeAccessIssue]
    before = [switch.fp32_precision for switch in switches]
    products = "ieee" if precision == "highest" else "tf32"
    convolutions = "tf32" if precision == "tf32" else "ieee"
    try:
        for switch, value in zip(switches, (products, convolutions), strict=True):
            switch.fp32_precision = value
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


class _Rounded(TorchDispatchMode):
    """Takes matrix products of float32 numbers from rounded factors. It sees the operations below vmap and autograd."""

    def __init__(self, precision: MatmulPrecision) -> None:
        super().__init__()
        self._split = precision == "tf32x3"

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and args[0].dtype == torch.float32:
            return self._product(func, *args)
        if func in _SUMS_WITH_PRODUCT and args[0].dtype == torch.float32:
            added, *factors = args
            product = self._product(_SUMS_WITH_PRODUCT[func], *factors)
            return kwargs.get("beta", 1) * added + kwargs.get("alpha", 1) * product
        return func(*args, **kwargs)

    def _product(self, multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        a1, b1 = to_tf32(a), to_tf32(b)
        if not self._split:
            return multiply(a1, b1)
        a2, b2 = to_tf32(a - a1), to_tf32(b - b1)
        return multiply(a1, b1) + (multiply(a1, b2) + multiply(a2, b1))
