"""Every test of this folder states what holds on an accelerator; it runs on the CPU too, so that the statement itself is known to be right.

`make test-gpu` runs the GPU's half alone.
"""

import pytest
import torch

GPUS = [pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "cuda:1")]


@pytest.fixture(params=["cpu", *GPUS], scope="session")
def device(request) -> torch.device:
    """The device under test. A second GPU is not the current one, so what runs on the current GPU alone fails there."""
    device = torch.device(request.param)
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        pytest.skip("no such CUDA device here; on a machine with one: make test-gpu")
    return device
