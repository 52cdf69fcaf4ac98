"""Sampling around a trained model: the local learning coefficient (LLC), related quantities, and the health of the chains."""

from icl.sampling.config import SamplerConfig
from icl.sampling.linear_response import susceptibility
from icl.sampling.llc import Inputs, can_share_a_batch, estimate_llc, estimate_llcs
from icl.sampling.loss_covariance import influence, loss_kernel
from icl.sampling.presets import AUTOMATIC, CALIBRATED, PRESETS, PUBLISHED
from icl.sampling.restriction import restrict
from icl.sampling.result import LLCResult

__all__ = [
    "AUTOMATIC",
    "CALIBRATED",
    "PRESETS",
    "PUBLISHED",
    "Inputs",
    "LLCResult",
    "SamplerConfig",
    "can_share_a_batch",
    "estimate_llc",
    "estimate_llcs",
    "influence",
    "loss_kernel",
    "restrict",
    "susceptibility",
]
