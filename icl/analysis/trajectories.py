"""A checkpoint as one row of a trajectory for `essential_dynamics.pca`: its outputs, its weights, or its gradient on a fixed
batch.

Adam's moments are flattened like weights (`weight_row`).
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from icl.model import InContextRegressionTransformer, flatten, predict, predict_with_activations, unflatten

Part = Literal["tokens", "predictions"]


def output_row(
    model: InContextRegressionTransformer, xs: Tensor, ys: Tensor, part: Part = "tokens", batch_size: int = 1024
) -> Tensor:
    """Outputs on fixed sequences, flattened: the functional ("f") trajectory.

    The part "tokens" is the published choice: all outputs at all tokens, B·2K·(D+1) numbers. "predictions" has
    only the trained outputs, B·K numbers.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    rows = []
    with torch.no_grad():
        for batch_xs, batch_ys in zip(xs.split(batch_size), ys.split(batch_size), strict=True):
            if part == "predictions":
                rows.append(predict(model.shape, parameters, batch_xs, batch_ys).reshape(-1))
            elif part == "tokens":
                rows.append(
                    predict_with_activations(model.shape, parameters, batch_xs, batch_ys)[1]["tokens"].reshape(-1)
                )
            else:
                raise ValueError(f"part must be 'tokens' or 'predictions', got {part!r}")
    return torch.cat(rows)


def weight_row(parameters: Mapping[str, Tensor]) -> Tensor:
    """Weights, or tensors with the same names such as Adam's moments, as one vector (P,): the "w" trajectory."""
    return flatten(parameters).detach()


def gradient_row(model: InContextRegressionTransformer, xs: Tensor, ys: Tensor, batch_size: int = 1024) -> Tensor:
    """Gradient (P,) of the mean squared error on fixed sequences: the "g" trajectory."""
    flat = flatten(dict(model.named_parameters())).detach().requires_grad_()
    total = torch.zeros_like(flat)
    for batch_xs, batch_ys in zip(xs.split(batch_size), ys.split(batch_size), strict=True):
        loss = F.mse_loss(predict(model.shape, unflatten(model.shape, flat), batch_xs, batch_ys), batch_ys)
        total += torch.autograd.grad(loss, flat)[0] * (len(batch_xs) / len(xs))
    return total.detach()
