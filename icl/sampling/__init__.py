"""Sampling around a trained model: the local learning coefficient, its relatives and their health."""

from icl.sampling.config import CALIBRATED, PRESETS, PUBLISHED, SamplerConfig
from icl.sampling.llc import estimate_llc
from icl.sampling.result import LLCResult

__all__ = ["CALIBRATED", "PRESETS", "PUBLISHED", "LLCResult", "SamplerConfig", "estimate_llc"]
