"""The local learning coefficient (LLC) along a training run: settings, one estimate, a whole run, records, tables."""

from icl.estimation.along_run import estimate_over_run
from icl.estimation.config import LLCConfig
from icl.estimation.estimate import estimate_at_checkpoint

__all__ = ["LLCConfig", "estimate_at_checkpoint", "estimate_over_run"]
