"""What ten chains cost: processor time per gradient of one run of ten chains against ten runs of one, on a CPU.

    python -m benchmarks.llc_chains [--output data/llc_accuracy]

Processor time, summed over threads, is what "no more per gradient" is about: it does not depend on what else the machine does, as the
clock's time does. Both sides make the same draws from the same seeds; the runs alternate, and the median ratio is reported.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import nn

from icl.evals import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.truth import deep_linear, mean_squared_error
from icl.streams import Stream
from icl.tasks import RegressionTask

CHAINS = 10


@dataclass(frozen=True)
class Case:
    """A model with its loss, its batches and the draws of one chain."""

    name: str
    model: nn.Module
    loss_fn: Callable
    batches: Callable
    draws: int


def cases() -> list[Case]:
    """The paper's transformer at a batch of 64 by the compiled kernel, and a module of each of the two general paths."""
    transformer = InContextRegressionTransformer(
        task_size=4, max_examples=8, embed_size=64, mlp_size=64, num_heads=4, num_layers=2, layer_norm=True, include_output=True
    )  # fmt: skip
    task = RegressionTask(4, 8, 0.125)
    sequences = partial(task.sample, Stream(0, "benchmark/chains"), batch_size=64)
    small, large = deep_linear((17, 11, 13), 3, 0), deep_linear((131, 151, 127), 7, 0)
    return [
        Case("transformer, 51,717 parameters", transformer, mse_loss, sequences, 20),
        Case("module, 330 parameters", small.module, mean_squared_error, lambda step: small.batch, 300),
        Case("module, 38,958 parameters", large.module, mean_squared_error, lambda step: large.batch, 40),
    ]


def seconds(case: Case, cores: int, chains: int, seeds: Sequence[int]) -> float:
    """Processor seconds of one run per seed."""
    start = time.process_time()
    for seed in seeds:
        config = SamplerConfig(
            num_chains=chains, num_draws=case.draws, epsilon=1e-7, gamma=1.0, nbeta=10.0, init_seed=seed, cores=cores
        )
        estimate_llc(case.model, case.loss_fn, case.batches, config)
    return time.process_time() - start


def compare(case: Case, cores: int, repetitions: int) -> dict[str, float | str | int]:
    """One row."""
    together, alone = [], []
    seconds(case, cores, CHAINS, [0])
    for _ in range(repetitions):
        together.append(seconds(case, cores, CHAINS, [0]))
        alone.append(seconds(case, 1, 1, range(CHAINS)))
    gradients = CHAINS * case.draws
    return {
        "case": case.name, "workers": cores, "ms_per_gradient_together": 1000 * median(together) / gradients,
        "ms_per_gradient_alone": 1000 * median(alone) / gradients,
        "together_over_alone": median(a / b for a, b in zip(together, alone, strict=True)),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("data/llc_accuracy"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for case in cases():
        for cores in (1, 2):
            rows.append(compare(case, cores, options.repetitions))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "chains.csv", index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format="%.3f"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
