"""The optimizer on flat parameter vectors: torch's own, with its whole state as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from icl.config import OptimizerConfig

STATE_NAMES = {
    "Adam": ("exp_avg", "exp_avg_sq", "step"),
    "AdamW": ("exp_avg", "exp_avg_sq", "step"),
    "SGD": ("momentum_buffer",),
}


class FlatOptimizer:
    """Updates one tensor (..., P) in place; leading axes are ensemble members that share the learning rate.

    One flat tensor costs one fused kernel per update, whatever the number of layers.
    """

    def __init__(self, config: OptimizerConfig, flat: Tensor) -> None:
        self._names = STATE_NAMES[config.optimizer_type]
        self._flat = flat.requires_grad_(True)
        rate, decay = config.lr, config.weight_decay
        if config.optimizer_type == "SGD":
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(
                [flat], lr=rate, weight_decay=decay, momentum=config.momentum or 0.0
            )
        else:
            kind = torch.optim.Adam if config.optimizer_type == "Adam" else torch.optim.AdamW
            fused = flat.device.type in ("cpu", "cuda")
            self._optimizer = kind([flat], lr=rate, weight_decay=decay, betas=config.betas, eps=config.eps, fused=fused)

    def update(self, gradient: Tensor, learning_rate: float) -> None:
        """One step along the gradient, of the shape of the parameters."""
        self._flat.grad = gradient
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Copies of the state's tensors; empty before the first update."""
        state = self._optimizer.state.get(self._flat, {})
        return {name: state[name].detach().clone() for name in self._names if state.get(name) is not None}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of `state()`."""
        if state:
            self._optimizer.state[self._flat] = {name: value.clone() for name, value in state.items()}
