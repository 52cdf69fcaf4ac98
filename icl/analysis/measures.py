"""The analyses that look at one checkpoint: a model and fixed data in, rows of a table out.

All checkpoints of a run are measured on the same sequences, which are functions of seeds, so that differences between
rows are differences between models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from icl.analysis.attention import attention_table
from icl.analysis.hessian import hessian_table
from icl.analysis.ood import effective_task_table, gain_sweep
from icl.analysis.structure import embedding_spectra, layer_norm_coordinates
from icl.analysis.task_prior import task_prior_table
from icl.config import Settings, TrainingConfig
from icl.evals import VALIDATION_SIZE, ValidationSet, make_evaluator, validation_metrics
from icl.model import InContextRegressionTransformer
from icl.streams import Stream
from icl.tasks import label

CURVATURE_SIZE = 1024
"""Sequences of the Hessian's loss, as in arXiv 2402.02364."""

OOD_SIZE = 256
"""Sequences of the gain sweep and of the effective task vectors."""


PREDICTION_BATCH = 1024


class DataSettings(Settings):
    """Which sequences the analyses use."""

    validation_seed: int = Field(default=0, description="seed of the validation set")
    validation_size: int = Field(default=VALIDATION_SIZE, description="sequences of the validation set")
    noise_std: float | None = Field(
        default=None,
        description="standard deviation of the labels' noise; None: √σ² of the training distribution. 0.125 gives the law "
        "of the reference code's figures, which take the training variance for it",
    )


@dataclass(frozen=True)
class AnalysisData:
    """The fixed sequences of a run's analyses; each part is made when it is first needed.

    Attributes:
        config: of the training run, seeds resolved.
        settings: which sequences.
        device: where they lie.
    """

    config: TrainingConfig
    settings: DataSettings = field(default_factory=DataSettings)
    device: torch.device | str = "cpu"

    @cached_property
    def validation(self) -> ValidationSet:
        """Gaussian-task sequences with their tasks and the noise of the out-of-distribution sets."""
        chosen = self.settings
        drawn = ValidationSet.draw(
            self.config.task_config.true_task(), chosen.validation_seed, chosen.validation_size, chosen.noise_std
        )
        errors = {gain: noise.to(self.device) for gain, noise in drawn.errors.items()}
        return ValidationSet(
            drawn.xs.to(self.device),
            drawn.ys.to(self.device),
            drawn.tasks.to(self.device),
            errors,
            drawn.law,
        )

    @cached_property
    def evaluator(self) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
        """The metrics logged during training."""
        return make_evaluator(self.config, self.device)

    @cached_property
    def training_tasks(self) -> Tensor | None:
        """The list of training tasks (M, D), or None for Gaussian tasks."""
        task = self.config.task_config.pretrain_task()
        return None if task.num_tasks is None else task.tasks.to(self.device)

    @cached_property
    def training_sequences(self) -> tuple[Tensor, Tensor]:
        """The evaluator's sequences of the training distribution: xs (B, K, D), ys (B, K, 1)."""
        seed = self.config.task_config.true_seed
        assert seed is not None, "seeds are resolved before use"
        stream = Stream(seed, "evaluation/pretrain")
        return self.config.task_config.pretrain_task().sample(stream, 0, self.config.eval_batch_size, self.device)


Measure = Callable[[InContextRegressionTransformer, AnalysisData], pd.DataFrame]


def _weights(model: InContextRegressionTransformer) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def _predict_in_batches(model: InContextRegressionTransformer, xs: Tensor, ys: Tensor) -> Tensor:
    """Predictions in batches, which bounds the memory and is a third faster on a CPU than one pass over all."""
    parts = zip(xs.split(PREDICTION_BATCH), ys.split(PREDICTION_BATCH), strict=True)
    return torch.cat([model(batch_xs, batch_ys) for batch_xs, batch_ys in parts])


def measure_evals(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: the evaluator's metrics and those on the validation set (`icl.evals`)."""
    with torch.no_grad():
        validation = validation_metrics(partial(_predict_in_batches, model), data.validation)
        return pd.DataFrame([data.evaluator(_weights(model)) | validation])


def measure_spectra(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: `structure.embedding_spectra`."""
    return embedding_spectra(_weights(model))


def measure_layer_norm(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per coordinate: `structure.layer_norm_coordinates`."""
    return layer_norm_coordinates(_weights(model))


def measure_attention(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per block, head and query token: `attention.attention_table` on the validation set."""
    return attention_table(model, data.validation.xs, data.validation.ys)


def measure_hessian(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: `hessian.hessian_table` on the first 1024 validation sequences."""
    return hessian_table(model, data.validation.xs[:CURVATURE_SIZE], data.validation.ys[:CURVATURE_SIZE])


def measure_task_prior(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: `task_prior.task_prior_table` on the evaluator's training sequences."""
    return task_prior_table(model, *data.training_sequences, data.training_tasks)


def measure_gain_sweep(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per version and gain: `ood.gain_sweep` on 256 validation sequences."""
    validation = data.validation
    xs, tasks = validation.xs[:OOD_SIZE], validation.tasks[:OOD_SIZE]
    return gain_sweep(model, xs, tasks, validation.ys[:OOD_SIZE] - label(xs, tasks, torch.zeros_like(xs[..., :1])))


def measure_effective_task(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row per position: `ood.effective_task_table` on 256 validation sequences."""
    validation = data.validation
    return effective_task_table(model, *(part[:OOD_SIZE] for part in (validation.xs, validation.ys, validation.tasks)))


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "evals": measure_evals,
        "spectra": measure_spectra,
        "layer_norm": measure_layer_norm,
        "attention": measure_attention,
        "hessian": measure_hessian,
        "task_prior": measure_task_prior,
        "gain_sweep": measure_gain_sweep,
        "effective_task": measure_effective_task,
    }
)
"""Name (also of the table's file) -> the analysis of one checkpoint."""
