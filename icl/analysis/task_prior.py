"""The distance of a model's predictions to those of the task prior's mean, early in training (arXiv 2402.02364).

Without in-context learning the best prediction is t̄·x, where t̄ is the mean training task: 0 for Gaussian tasks, and the mean
of the M tasks otherwise. Models trained on few tasks first approach the mean task. Models trained on many tasks first
predict 0.

Shapes: B batch, K examples, D task dimension, M tasks.
"""

import pandas as pd
import torch
from torch import Tensor

from icl.analysis.data import AnalysisData
from icl.baselines import Predictor
from icl.model import InContextRegressionTransformer


def prior_distances(predictions: Tensor, xs: Tensor, tasks: Tensor | None = None) -> pd.DataFrame:
    """Squared distances of predictions (B, K, 1) to those of the prior, summed over tokens and averaged over sequences.

    One row: `task_prior/zero` = E Σ_k ŷ_k², and `task_prior/mean_task` = E Σ_k (ŷ_k - t̄·x_k)², where t̄ is the mean of `tasks`
    (M, D). If `tasks` is None (Gaussian tasks), t̄ = 0 and both are equal.
    """
    zero = float(predictions.square().sum(dim=(1, 2)).mean())
    mean_task = zero
    if tasks is not None:
        expected = xs @ tasks.to(xs).mean(dim=0)[:, None]
        mean_task = float((predictions - expected).square().sum(dim=(1, 2)).mean())
    return pd.DataFrame([{"task_prior/zero": zero, "task_prior/mean_task": mean_task}])


def task_prior_table(predictor: Predictor, xs: Tensor, ys: Tensor, tasks: Tensor | None = None) -> pd.DataFrame:
    """`prior_distances` of a predictor on sequences xs (B, K, D), ys (B, K, 1) of the training distribution."""
    with torch.no_grad():
        return prior_distances(predictor(xs, ys), xs, tasks)


def measure_task_prior(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: `task_prior_table` on the evaluator's training sequences."""
    return task_prior_table(model, *data.training_sequences, data.training_tasks)
