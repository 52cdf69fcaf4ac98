"""What each analysis costs per checkpoint: CPU seconds of one thread, which other work on the machine lengthens little.

python -m benchmarks.speed.analysis_cost data/L2H4Minf/checkpoints/icl/RUN [--checkpoints 3]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from icl.analysis.data import AnalysisData
from icl.analysis.measures import MEASURES
from icl.analysis.run import TRAJECTORY_ROWS, load_model
from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.storage import LocalStore


def main() -> None:
    """Print mean CPU seconds per analysis, and their sum over all checkpoints of the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoints", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    checkpoints = Checkpoints(LocalStore(folder.parent.parent), folder.name)
    stored = checkpoints.config()
    if stored is None:
        raise SystemExit(f"{folder} has no config.json; give the folder of a run")
    config = TrainingConfig.parse(stored).resolved()
    data = AnalysisData(config)
    _ = data.validation, data.evaluator, data.training_sequences
    steps = checkpoints.steps()
    chosen = [steps[i] for i in np.linspace(0, len(steps) - 1, options.checkpoints + 2).round().astype(int)][1:-1]
    works = {name: lambda model, work=work: work(model, data) for name, work in MEASURES.items()}
    works |= {
        f"trajectory of {name}": lambda model, row=row: row(model, *data.training_sequences)
        for name, row in TRAJECTORY_ROWS.items()
    }
    total = 0.0
    for name, work in works.items():
        start = time.process_time()
        for step in chosen:
            work(load_model(checkpoints, config, step))
        cost = (time.process_time() - start) / len(chosen)
        total += cost
        print(f"{name:26} {cost:8.2f} s", flush=True)
    print(f"{'together':26} {total:8.2f} s, {total * len(steps) / 60:.1f} min for {len(steps)} checkpoints")


if __name__ == "__main__":
    main()
