"""What sampling costs on a CPU: one run of ten chains against ten runs of one, and icl's default against devinterp's samplers.

    python -m benchmarks.llc.cost [--output data/llc_accuracy]

Processor time per gradient, summed over threads: unlike the clock's it depends little on what else the machine does. The two sides of a
ratio alternate, and the median ratio is reported.
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

from benchmarks.llc.devinterp import GRIDS, devinterp_estimate
from icl.engine import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import AUTOMATIC, SamplerConfig, estimate_llc
from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.truth import deep_linear, linear_regression, mean_squared_error
from icl.storage.files import write_table
from icl.streams import Stream
from icl.tasks import RegressionTask

CHAINS = 10

NUM_SAMPLES = 2**17
"""n, of nβ = n / log n: the models' losses are those of endless data."""


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


def samplers(repetitions: int) -> pd.DataFrame:
    """Processor milliseconds per gradient and chain of icl's default, pilot included, and of devinterp's samplers on the same gradients."""
    rows = []
    for model in (linear_regression(101, 0), deep_linear((23, 28, 25), 6, 0), deep_linear((67, 41, 97, 53), 11, 0)):
        config = AUTOMATIC.model_copy(
            update={"eval_dataset_size": NUM_SAMPLES, "num_draws": 500, "num_burnin_steps": 300}
        )
        objective = model.objective()
        times: dict[str, list[float]] = {name: [] for name in ("icl", *GRIDS)}
        for _ in range(repetitions):
            start = time.process_time()
            result = estimate_llc_of(objective, Inputs([model.batch]), config)
            assert result.tuned is not None
            gradients = result.tuned.gradients + config.num_chains * config.num_steps
            times["icl"].append(time.process_time() - start)
            for method in GRIDS:
                start = time.process_time()
                devinterp_estimate(model, method, 1e-6, 1.0, gradients, config)
                times[method].append(time.process_time() - start)
            row = {"model": model.name, "parameters": model.num_parameters}
        rows.append(row | {name: 1000 * median(values) / gradients for name, values in times.items()})
    return pd.DataFrame(rows)


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
    for name, table in (("chains", pd.DataFrame(rows)), ("cost", samplers(options.repetitions))):
        write_table(table, options.output / f"{name}.csv", digits=4)
        print(table.to_string(index=False, float_format="%.3f"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
