"""The machine of a measurement: its name, its cores in use, and the folder for its results."""

import platform
import re
from pathlib import Path

import torch

from icl.devices import available_cores

RESULTS = Path(__file__).parents[1] / "results"
CORES = min(2, available_cores(torch.device("cpu")))
"""Two at most: the numbers that are asked for are those of two cores."""


def device_name() -> str:
    """The processor, its cores in use, and the versions that decide its speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "SSE"
        model = f"{model} ({vectors})"
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {CORES} cores, torch {torch.__version__.split('+')[0]}"


def slug(device: str) -> str:
    """The device's name, without versions, as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device.split(", torch")[0]).strip("-").lower()
