"""The metrics of `icl.evals` at a checkpoint, as one row of a table."""

from functools import partial

import pandas as pd
import torch
from torch import Tensor

from icl.analysis.data import AnalysisData
from icl.analysis.loss_on_data import LossOnData
from icl.evals import validation_metrics, weight_norm
from icl.model import InContextRegressionTransformer

PREDICTION_BATCH = 1024


def measure_evals(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: the metrics logged during training, and those on the validation set."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    with torch.no_grad():
        validation = validation_metrics(partial(_predict_in_batches, model), data.validation)
        return pd.DataFrame([data.evaluator(weights) | validation])


def measure_loss(at: LossOnData) -> pd.DataFrame:
    """One row for any subject: `loss/mean`, the loss at w*, and `weight/norm`, √Σ‖p‖² over all parameters."""
    weights = {name: value.detach() for name, value in at.model.named_parameters()}
    return pd.DataFrame([{"loss/mean": at.value(), "weight/norm": weight_norm(weights)}])


def _predict_in_batches(model: InContextRegressionTransformer, xs: Tensor, ys: Tensor) -> Tensor:
    """Predictions in batches. This bounds the memory, and on a CPU it is a third faster than one pass over all sequences."""
    parts = zip(xs.split(PREDICTION_BATCH), ys.split(PREDICTION_BATCH), strict=True)
    return torch.cat([model(batch_xs, batch_ys) for batch_xs, batch_ys in parts])
