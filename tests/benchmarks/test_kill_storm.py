"""The kill storm, in short: the long one is `python benchmarks/kill_storm.py 200`."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_storm.py"


def test_nothing_is_lost_when_training_is_killed_at_random_moments():
    result = subprocess.run(
        [sys.executable, SCRIPT, "5"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5  kills" in result.stdout
