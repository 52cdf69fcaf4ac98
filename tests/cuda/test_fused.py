"""The fused kernel equals float64 to rounding: on a GPU compiled, elsewhere in Triton's interpreter."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fused_errors.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="the fused kernel is written in Triton: pip install triton")
def test_the_fused_kernel_is_the_model(device):
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device.type == "cpu" else {})
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(device)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert len(found) == 5
    for sizes, errors in found.items():
        for what, error in errors.items():
            assert error <= 1e-5, f"{sizes}: {what}"
