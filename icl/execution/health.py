"""Whether a training run learned anything."""

import math

from icl.config import Training, TrainingConfig
from icl.config.language import LanguageTraining
from icl.evals import zero_loss

ABOVE = 1.01
"""How far above a reference the loss must be to be told: on the same sequences, so that their noise is no excuse."""


def loss_name(config: Training) -> str:
    """The metric that tells: mean squared error on fixed sequences of the training distribution; for text, the loss on rows held out."""
    return "pretrain/mse" if isinstance(config, TrainingConfig) else "test/loss"


def remark(config: Training, first: float | None, last: float | None) -> str:
    """What to say of a run whose loss went from `first` to `last`: nothing, if it learned; seeds must be resolved.

    The references are the loss that it began with, and that of predicting 0 on the same sequences, or for text all tokens alike.
    """
    if last is None:
        return ""
    references = ((first, "where it began"), _knowing_nothing(config))
    above = [f"{value:,.4g}, {what}" for value, what in references if value is not None and last > ABOVE * value]
    if not above:
        return ""
    return (
        f"the loss ended at {last:,.4g}, above {', and above '.join(above)}: it did not learn; lower optimizer_config.lr "
        f"(now {config.optimizer_config.lr:g}), or train longer"
    )


def _knowing_nothing(config: Training) -> tuple[float | None, str]:
    """The loss of a model that knows nothing, and what to call it."""
    if isinstance(config, TrainingConfig):
        return zero_loss(config), "that of predicting zero"
    if isinstance(config, LanguageTraining):
        return math.log(config.task_config.d_vocab), "that of taking all tokens for equally likely"
    return None, ""
