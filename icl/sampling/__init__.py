"""Sampling around a trained model: the local learning coefficient, its relatives and their health."""

from icl.sampling.config import SamplerConfig
from icl.sampling.llc import estimate_llc
from icl.sampling.presets import AUTOMATIC, CALIBRATED, PRESETS, PUBLISHED
from icl.sampling.result import LLCResult

__all__ = ["AUTOMATIC", "CALIBRATED", "PRESETS", "PUBLISHED", "LLCResult", "SamplerConfig", "estimate_llc"]
