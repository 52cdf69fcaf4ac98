"""Whether the reported standard error of λ̂ is one: 50 repetitions of the default estimator on each of several models, and 100 of every
kernel on linear regression with curvatures alike and spread.

    python -m benchmarks.llc.standard_errors [--repetitions 50] [--only kernels] [--output data/llc_accuracy]

Repetitions are groups of chains of one large run, at the constants that its pilot chains found: chains are independent given those. A
repetition covers a number if that lies within two of its reported standard errors. Two numbers are asked for: the long-run mean (that of
all repetitions), about which the standard error makes its claim, and the truth, which the estimator's bias (finite nβ, localisation) may
keep away; where |bias| exceeds the standard error the second is no test of the error, and the table's `bias_in_errors` says so.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks.llc import NUM_SAMPLES
from benchmarks.llc.targets import Target, regression
from icl.sampling import AUTOMATIC, SamplerConfig
from icl.sampling.diagnostics import mcse_of_mean
from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.truth import KnownModel, deep_linear, linear_regression, warped_regression
from icl.storage.files import write_table


def models() -> list[KnownModel]:
    """Regular, reduced-rank and deep linear models, small enough for hundreds of chains."""
    return [
        linear_regression(11, 0),
        warped_regression(13, 0),
        deep_linear((7, 5, 11), 2, 0),
        deep_linear((7, 5, 11, 3), 1, 0),
        deep_linear((5, 8, 6, 9, 4), 2, 0),
    ]


KERNEL_REPETITIONS = 100
KERNELS: dict[str, dict] = {
    "sgld": {},
    "langevin": {"sampling_method": "langevin"},
    "rmsprop_sgld": {"sampling_method": "rmsprop_sgld"},
    "sgnht": {"sampling_method": "sgnht"},
}
STEPS = {"sgld": 0.1, "langevin": 0.49, "rmsprop_sgld": 0.1, "sgnht": 0.1}
"""ε λ_max of every kernel."""


def spectra() -> list[Target]:
    """Five curvatures that are alike, and five from 1 to 1/1,000."""
    return [regression("5 curvatures alike", 1000, 5), regression("5 curvatures, spread 1,000", 1000, 5, 1000.0)]


def kernel_coverage(target: Target, kernel: str, repetitions: int) -> dict[str, float | str | int]:
    """One row: how often the mean of all repetitions, itself known to a tenth of an error, lies within two reported standard errors."""
    assert target.curvatures is not None
    nbeta = target.num_samples / math.log(target.num_samples)
    epsilon = STEPS[kernel] / (nbeta * float(target.curvatures.max()) + 1.0)
    config = SamplerConfig.parse({
        "num_chains": 8 * repetitions, "num_draws": 1000, "num_burnin_steps": 500, "epsilon": epsilon, "gamma": 1.0, "init_seed": 0,
        "test_target": False, **KERNELS[kernel],
    })  # fmt: skip
    result = estimate_llc_of(target.at(0.0), Inputs(target.batches(None)), config)
    groups = result.excess_trace.reshape(repetitions, 8, -1)
    means = groups.mean(dim=(1, 2))
    errors = torch.tensor([mcse_of_mean(group) for group in groups], dtype=torch.float64)
    mean, spread, reported = float(means.mean()), float(means.std()), float(errors.mean())
    return {
        "model": target.name, "kernel": kernel, "repetitions": repetitions, "long_run_mean": mean, "spread": spread,
        "reported_error": reported, "reported_over_spread": reported / spread,
        "mean_within_2": float(((means - mean).abs() < 2 * errors).double().mean()),
    }  # fmt: skip


def coverage(model: KnownModel, config: SamplerConfig, repetitions: int) -> dict[str, float | str | int]:
    """One row: how often the long-run mean, and the truth, lie within two reported standard errors."""
    many = config.model_copy(update={"num_chains": repetitions * config.num_chains})
    result = estimate_llc_of(model.objective(), Inputs([model.batch]), many)
    groups = result.excess_trace.reshape(repetitions, config.num_chains, -1)
    healthy = torch.isfinite(groups).all(dim=2).all(dim=1)
    means = groups[healthy].mean(dim=(1, 2))
    errors = torch.tensor([mcse_of_mean(group) for group in groups[healthy]], dtype=torch.float64)
    mean, spread, reported = float(means.mean()), float(means.std()), float(errors.mean())
    return {
        "model": model.name, "family": model.family, "repetitions": int(healthy.sum()), "coefficient": model.coefficient,
        "long_run_mean": mean, "spread": spread, "reported_error": reported, "reported_over_spread": reported / spread,
        "bias_in_errors": (mean - model.coefficient) / reported,
        "mean_within_2": float(((means - mean).abs() < 2 * errors).double().mean()),
        "truth_within_2": float(((means - model.coefficient).abs() < 2 * errors).double().mean()),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--draws", type=int, default=AUTOMATIC.num_draws, help="per chain; fewer is for a first look")
    parser.add_argument("--only", choices=("models", "kernels"), help="one of the two tables")
    parser.add_argument("--output", type=Path, default=Path("data/llc_accuracy"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only != "models":
        rows = []
        for target in spectra():
            for kernel in KERNELS:
                rows.append(kernel_coverage(target, kernel, KERNEL_REPETITIONS))
                print(rows[-1], flush=True)
        write_table(pd.DataFrame(rows), options.output / "standard_errors_kernels.csv", digits=4)
    if options.only == "kernels":
        return 0
    config = AUTOMATIC.model_copy(update={"eval_dataset_size": NUM_SAMPLES, "num_draws": options.draws})
    rows = []
    for model in models():
        rows.append(coverage(model, config, options.repetitions))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    write_table(table, options.output / "standard_errors.csv", digits=4)
    print(table.to_string(index=False, float_format="%.3f"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
