"""A check whether a training run learned anything."""

import math

from icl.config import Training, TrainingConfig
from icl.config.language import LanguageTraining
from icl.evals import zero_loss

ABOVE = 1.01
"""A loss above a reference times this is remarked on. Both are measured on the same sequences, so their noise cancels."""


def loss_name(config: Training) -> str:
    """The metric to judge by: the mean squared error on fixed sequences of the training distribution, or for text the held-out loss."""
    return "pretrain/mse" if isinstance(config, TrainingConfig) else "test/loss"


def remark(config: Training, first: float | None, last: float | None) -> str:
    """A remark on a run whose loss went from `first` to `last`; empty if it learned. Seeds must be resolved.

    The last loss is compared with two references: the first loss, and the loss of a model that knows nothing. For regression
    that model predicts 0, for text it gives all tokens the same probability.
    """
    if last is None:
        return ""
    references = ((first, "the first loss"), _uninformed_loss(config))
    above = [f"{what} ({value:,.4g})" for value, what in references if value is not None and last > ABOVE * value]
    if not above:
        return ""
    return (
        f"the loss ended at {last:,.4g}, above {' and '.join(above)}: the run did not learn; lower optimizer_config.lr (now "
        f"{config.optimizer_config.lr:g}), or train longer"
    )


def _uninformed_loss(config: Training) -> tuple[float | None, str]:
    """The loss of a model that knows nothing, and its name in the remark."""
    if isinstance(config, TrainingConfig):
        return zero_loss(config), "the loss of predicting zero"
    if isinstance(config, LanguageTraining):
        return math.log(config.task_config.d_vocab), "the loss of giving all tokens the same probability"
    return None, ""
