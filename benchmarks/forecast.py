"""Predicted against actual time of `icl train`, `llc` and `calibrate`: python -m benchmarks.forecast, on a quiet machine.

Each command is first asked with --dry-run, then timed, in a fresh folder. Prints one row each; the ratio should lie between
2/3 and 3/2.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from icl.storage.files import write_atomically

SWEEP = """\
method: grid
parameters:
  task_config:
    parameters:
      task_size: {value: 4}
      max_examples: {value: 8}
      num_tasks: {value: inf}
      embed_size: {value: 64}
      mlp_size: {value: 64}
      num_heads: {value: 4}
      num_layers: {value: 2}
      model_seed: {values: [0, 1, 2]}
  num_steps: {value: 3000}
"""
COMMANDS = (
    ("train", "mine.yaml"),
    ("llc", "mine.yaml", "--preset", "calibrated", "--checkpoints", "2"),
    ("calibrate", "mine.yaml", "--step", "2999", "--epsilon", "1e-5", "--gamma", "100", "--nbeta", "10"),
)


def icl(folder: Path, *words: str) -> tuple[float, str]:
    """Wall seconds and output of a command."""
    begun = time.perf_counter()
    environment = {**os.environ, "LOCAL_ROOT": str(folder / "checkpoints")}
    done = subprocess.run(
        [sys.executable, "-m", "icl", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - begun, done.stdout


def seconds_in(text: str) -> int:
    """The time in a line such as `about 0:01:30 and ...`."""
    found = re.search(r"about (\d+):(\d\d):(\d\d)", text)
    assert found, text
    hours, minutes, seconds = map(int, found.groups())
    return 3600 * hours + 60 * minutes + seconds


def main() -> None:
    """Print the table."""
    print("command,predicted_s,actual_s,ratio")
    with tempfile.TemporaryDirectory() as folder:
        write_atomically(Path(folder) / "mine.yaml", SWEEP.encode())
        for words in COMMANDS:
            _, foreseen = icl(Path(folder), *words, "--dry-run")
            predicted = seconds_in(foreseen)
            actual, _ = icl(Path(folder), *words)
            print(f"{words[0]},{predicted},{actual:.0f},{actual / predicted:.2f}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # so that --help explains, and starts nothing
    main()
