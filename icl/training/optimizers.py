"""The optimiser on flat parameter vectors: Adam (Kingma & Ba 2015), AdamW or SGD, as torch.optim defines them.

Shapes: E members, P parameters.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from icl.config import OptimizerConfig, Training


class Rates(NamedTuple):
    """The step-dependent numbers of an update, with t the number of the update, counted from 1."""

    learning_rate: float | Tensor
    """η"""
    step_size: float | Tensor
    """Adam's η / (1 - β₁ᵗ)"""
    correction: float | Tensor
    """Adam's √(1 - β₂ᵗ)"""


def rates_at(config: Training, step: int) -> Rates:
    """The rates of update number `step`, counted from 0. They are in double precision, because 1 - β₂ᵗ cancels in float32."""
    rate, (beta1, beta2), time = config.learning_rate(step), config.optimizer_config.betas, step + 1
    return Rates(rate, rate / (1 - beta1**time), (1 - beta2**time) ** 0.5)


class FlatOptimizer:
    """Updates the parameters `flat` (..., P) in place. Leading axes are members that share the rates.

    On a CPU, torch's fused kernel does the update in one pass. On other devices it is done by tensor operations, in place and
    without numbers from the host, so that a step can be captured or compiled. Both follow the same rule and agree to
    rounding.

    Args:
        config: the rule and its constants.
        flat: the parameters.
        state: an earlier result of `state`, to continue from; None or empty for a fresh start.
        fused: whether to use torch's kernel. None: only on a CPU.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        flat: Tensor,
        state: Mapping[str, Tensor] | None = None,
        fused: bool | None = None,
    ) -> None:
        self._config, self._flat = config, flat.requires_grad_(False)
        state = state or {}
        self.moments = {
            name: state[name].detach().clone().to(flat.device) if name in state else torch.zeros_like(flat)
            for name in _moment_names(config)
        }
        self._counts = config.optimizer_type != "SGD"
        self._kernel: torch.optim.Optimizer | None = None
        if fused or (fused is None and flat.device.type == "cpu"):
            self._kernel = self._fused_kernel(state.get("step"))

    def update(self, gradient: Tensor, rates: Rates) -> None:
        """One update along the gradient (..., P)."""
        if self._kernel is not None:
            self._flat.grad = gradient
            self._kernel.param_groups[0]["lr"] = rates.learning_rate
            self._kernel.step()
            return
        config, flat, moments = self._config, self._flat, self.moments
        if config.optimizer_type == "AdamW":
            flat.mul_(1 - rates.learning_rate * config.weight_decay)
        elif config.weight_decay:
            gradient = gradient + config.weight_decay * flat
        if config.optimizer_type == "SGD":
            if config.momentum:
                gradient = moments["momentum_buffer"].mul_(config.momentum).add_(gradient)
            flat.sub_(rates.learning_rate * gradient)
            return
        beta1, beta2 = config.betas
        mean = moments["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = moments["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        flat.sub_(rates.step_size * mean / (square.sqrt() / rates.correction + config.eps))

    def state(self, updates: int) -> dict[str, Tensor]:
        """Copies of the moments on the host, and for Adam and AdamW `step`, the number of updates done."""
        counted = {"step": torch.tensor(float(updates))} if self._counts else {}
        return {name: value.detach().cpu().clone() for name, value in self.moments.items()} | counted

    def _fused_kernel(self, updates: Tensor | None) -> torch.optim.Optimizer:
        """torch's optimizer, whose state consists of the tensors in `moments`."""
        config = self._config
        flat, rate, decay = self._flat.requires_grad_(True), config.lr, config.weight_decay
        if config.optimizer_type == "SGD":
            kernel: torch.optim.Optimizer = torch.optim.SGD(
                [flat], lr=rate, weight_decay=decay, momentum=config.momentum or 0.0
            )
            if self.moments:
                kernel.state[flat] = dict(self.moments)
            return kernel
        kind = torch.optim.Adam if config.optimizer_type == "Adam" else torch.optim.AdamW
        kernel = kind([flat], lr=rate, weight_decay=decay, betas=config.betas, eps=config.eps, fused=True)
        kernel.state[flat] = {"step": torch.zeros(()) if updates is None else updates.clone(), **self.moments}
        return kernel


def _moment_names(config: OptimizerConfig) -> tuple[str, ...]:
    if config.optimizer_type == "SGD":
        return ("momentum_buffer",) if config.momentum else ()
    return ("exp_avg", "exp_avg_sq")
