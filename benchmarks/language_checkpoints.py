"""Some checkpoints of a run of sweeps/training-runs/language-quick.yaml in half precision, under the names of the published files.

    python -m benchmarks.language_checkpoints RUN_FOLDER [STEP...]

writes them to data/language-quick/checkpoints/.
"""

import argparse
from pathlib import Path

import safetensors.torch

from benchmarks.language import QUICK_STEPS
from icl.storage.files import write_atomically
from icl.subjects.language_checkpoints import FolderCheckpoints, load_weights

OUTPUT = Path(__file__).parents[1] / "data" / "language-quick" / "checkpoints"


def halved(folder: Path, steps: list[int], output: Path) -> list[Path]:
    """Write the checkpoints of these steps in half precision; returns the files."""
    found, written = FolderCheckpoints(folder), []
    for step in steps:
        weights = {name: value.half() for name, value in load_weights(found.path(step)).items()}
        written.append(output / f"checkpoint_{step:0>7d}.safetensors")
        write_atomically(written[-1], safetensors.torch.save(weights))
    return written


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("steps", type=int, nargs="*", default=QUICK_STEPS, help="default: those that are shipped")
    options = parser.parse_args()
    for path in halved(options.run, options.steps, OUTPUT):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
