"""Every test of this folder states what holds on an accelerator; it runs on the CPU too, so that the statement itself is known to be right.

`make test-gpu` runs the GPU's half alone.
"""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], scope="session")
def device(request) -> torch.device:
    """The device under test."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here; on a machine with one: make test-gpu")
    return torch.device(request.param)
