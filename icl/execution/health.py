"""Whether a training run learned anything."""

from icl.config import TrainingConfig
from icl.evals import zero_loss

LOSS = "pretrain/mse"
"""The metric: the mean squared error on fixed sequences of the training distribution."""

ABOVE = 1.01
"""How far above a reference the loss must be to be told: on the same sequences, so that their noise is no excuse."""


def remark(config: TrainingConfig, first: float | None, last: float | None) -> str:
    """What to say of a run whose loss went from `first` to `last`: nothing, if it learned; seeds must be resolved.

    The references are the loss that it began with, and that of predicting 0 on the same sequences.
    """
    if last is None:
        return ""
    references = ((first, "where it began"), (zero_loss(config), "that of predicting zero"))
    above = [f"{value:,.4g}, {what}" for value, what in references if value is not None and last > ABOVE * value]
    if not above:
        return ""
    return (
        f"the loss ended at {last:,.4g}, above {', and above '.join(above)}: it did not learn; lower optimizer_config.lr "
        f"(now {config.optimizer_config.lr:g}), or train longer"
    )
