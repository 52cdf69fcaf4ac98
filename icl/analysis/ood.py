"""Out-of-distribution behaviour: the loss for scaled inputs or tasks, and the linear map that a model applies to its next input.

Shapes: B batch, K examples, D task dimension.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from icl.analysis.data import AnalysisData
from icl.baselines import Predictor
from icl.model import InContextRegressionTransformer
from icl.tasks import dot

Response = Callable[[Tensor, Tensor], Tensor]
"""Inputs and tasks -> labels without noise."""

NUM_SEQUENCES = 256
"""The number of sequences of the gain sweep and of the effective task vectors."""

GAINS = tuple(float(gain) for gain in np.logspace(-2.5, 4.5, 29))
"""Four gains per factor of ten, from far below the training distribution to far above."""


def gain_sweep(
    predictor: Predictor,
    xs: Tensor,
    tasks: Tensor,
    errors: Tensor,
    gains: Sequence[float] = GAINS,
    response: Response = dot,
) -> pd.DataFrame:
    """The loss as a function of the gain g of inputs or of tasks.

    Labels are y^g = w·(g x) + error in both versions, or another response to g x and w in place of the product. In the version
    "inputs" the model gets g·x. In the version "tasks" it gets x; with the product its task is then g·w. The errors are the same at
    every gain, so differences between gains are not noise.

    Args:
        predictor: (xs, ys) -> predictions.
        xs, tasks, errors: (B, K, D), (B, D), (B, K, 1).
        gains: positive numbers.
        response: labels without noise, (xs, tasks) -> (B, K, 1) (`icl.tasks.RegressionTask.response`).

    Returns:
        One row per `version` and `gain`: `loss` (mean over sequences and tokens), `loss_per_square` = loss/g² (constant at large g
        for a linear predictor), and `output_ratio`, the root mean square prediction relative to that at g = 1.
    """
    rows = []
    with torch.no_grad():
        reference = predictor(xs, response(xs, tasks) + errors).square().mean().sqrt()
        for version in ("inputs", "tasks"):
            for gain in map(float, gains):  # a NumPy scalar would turn the products into NumPy's
                ys = response(gain * xs, tasks) + errors
                predictions = predictor(gain * xs if version == "inputs" else xs, ys)
                loss = float((predictions - ys).square().mean())
                ratio = float(predictions.square().mean().sqrt() / reference)
                rows.append((version, gain, loss, loss / gain**2, ratio))
    return pd.DataFrame(rows, columns=pd.Index(["version", "gain", "loss", "loss_per_square", "output_ratio"]))


def effective_tasks(predictor: Predictor, xs: Tensor, ys: Tensor) -> Tensor:
    """The task vector t̂ that a model effectively uses at each position, (B, K, D).

    The input at position p is replaced by r·e_i for each unit vector e_i, where r is the mean ‖x‖. Then t̂_i = ŷ_p / r. For a
    predictor that is linear in its current input, such as ridge, t̂ is its estimate of the task.
    """
    batch, examples, size = xs.shape
    scale = xs.norm(dim=-1).mean()
    units = scale * torch.eye(size, dtype=xs.dtype, device=xs.device)
    positions = []
    with torch.no_grad():
        for position in range(examples):
            # Models are causal, so the sequence may end at the position.
            probed = xs[:, None, : position + 1].repeat(1, size, 1, 1)
            probed[:, :, position] = units
            labels = ys[:, None, : position + 1].expand(-1, size, -1, -1)
            answers = predictor(probed.flatten(0, 1), labels.flatten(0, 1))[:, position, 0]
            positions.append(answers.reshape(batch, size) / scale)
    return torch.stack(positions, dim=1)


def effective_task_table(predictor: Predictor, xs: Tensor, ys: Tensor, tasks: Tensor) -> pd.DataFrame:
    """Comparison of `effective_tasks` with the true tasks (B, D).

    One row per `position` (0-based, examples seen so far): `cosine`, the mean cosine to w, and `relative_norm`, the
    mean ‖t̂‖/‖w‖.
    """
    found = effective_tasks(predictor, xs, ys)
    cosine = torch.cosine_similarity(found, tasks[:, None, :], dim=-1).mean(dim=0)
    relative = (found.norm(dim=-1) / tasks.norm(dim=-1)[:, None]).mean(dim=0)
    return pd.DataFrame(
        {"position": np.arange(xs.shape[1]), "cosine": cosine.cpu().numpy(), "relative_norm": relative.cpu().numpy()}
    )


def measure_gain_sweep(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per version and gain: `gain_sweep` on 256 validation sequences."""
    validation = data.validation
    xs, ys, tasks = (part[:NUM_SEQUENCES] for part in (validation.xs, validation.ys, validation.tasks))
    response = validation.law.response
    return gain_sweep(model, xs, tasks, ys - response(xs, tasks), response=response)


def measure_effective_task(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per position: `effective_task_table` on 256 validation sequences."""
    validation = data.validation
    parts = (part[:NUM_SEQUENCES] for part in (validation.xs, validation.ys, validation.tasks))
    return effective_task_table(model, *parts)
