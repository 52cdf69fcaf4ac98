"""What an estimate costs against the size of the model, on one CPU thread, beside devinterp 2.0.1.

    python -m benchmarks.llc.size [--output data/llc_accuracy] [--figure FILE]

For linear networks of two layers and 10^3 to 10^7 parameters at a batch of 16, with 8 chains, processor milliseconds per gradient:

- of `estimate_llc(model, loss, data)` with the default kernel, tests of the target included, and of `devinterp.slt.llc.llc`: what a
  researcher runs. What a call costs once, such as loading, is left out: a run is compared with one four times as long;
- of noise alone, by icl's reproducible generator and by `torch.randn`.

The two sides alternate in one process. And the peak of memory of a run of the automatic setting, its pilot included, in vectors of the
parameters per chain, measured in a process of its own.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from icl.sampling import AUTOMATIC, SamplerConfig, estimate_llc
from icl.sampling.diagnostics import student_factor
from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.objective import ModuleObjective
from icl.sampling.truth import KnownModel, deep_linear
from icl.storage.files import write_table
from icl.streams import Stream

WIDTHS = (23, 71, 227, 709, 2239)
CHAINS, BATCH = 8, 16
EPSILON, GAMMA, NBETA = 1e-6, 1.0, 100.0
NOISES = 20


def model_of(width: int) -> KnownModel:
    """2 width² parameters."""
    model = deep_linear((width, width, width), 3, 0)
    inputs, targets = model.batch
    return KnownModel(
        model.name, model.family, model.module, model.loss_fn, (inputs[:BATCH], targets[:BATCH]), model.coefficient, model.multiplicity
    )  # fmt: skip


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def by_devinterp(model: KnownModel, draws: int) -> None:
    """devinterp's estimate of the module on the model's one batch, as its documentation writes it."""
    from datasets import Dataset
    from devinterp.slt.llc import llc

    xs, ys = model.batch
    rows = Dataset.from_dict({"input_ids": [[index, 0] for index in range(len(xs))]}).with_format("torch")

    def loss(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return (module(xs[ids[:, 0]]) - ys[ids[:, 0]]).square().mean(dim=-1, keepdim=True)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        llc(
            model.module, rows, {}, loss_fn=loss, batch_size=len(xs), num_init_loss_batches=1, lr=EPSILON,
            n_beta=NBETA, localization=GAMMA, num_chains=CHAINS, num_draws=draws, output_path=Path(folder) / "draws",
        )  # fmt: skip


def of_one_gradient(run: Callable[[int], object], draws: int) -> float:
    """Processor milliseconds, from a run and one four times as long."""
    short, long = seconds(lambda: run(draws)), seconds(lambda: run(4 * draws))
    return 1000 * (long - short) / (3 * CHAINS * draws)


def times(width: int, repetitions: int) -> dict[str, float]:
    """One row, without the memory."""
    model, draws = model_of(width), {23: 400, 71: 200, 227: 60, 709: 20, 2239: 4}[width]
    size = 2 * width**2
    config = SamplerConfig(
        sampling_method="langevin", num_chains=CHAINS, num_draws=draws, epsilon=EPSILON, gamma=GAMMA, nbeta=NBETA, init_seed=0
    )  # fmt: skip

    def by_icl(draws: int) -> None:
        estimate_llc(model.module, model.loss_fn, [model.batch], config.model_copy(update={"num_draws": draws}))

    ours, theirs, noise, randn = [], [], [], []
    generator = torch.Generator().manual_seed(0)
    held = torch.empty(size)
    for _ in range(repetitions):
        ours.append(of_one_gradient(by_icl, draws))
        theirs.append(of_one_gradient(lambda count: by_devinterp(model, count), draws))
        noise.append(seconds(lambda: [Stream(0, "benchmark").fill_normal(step, held) for step in range(NOISES)]))
        randn.append(seconds(lambda: [torch.randn(size, generator=generator) for _ in range(NOISES)]))
    return {
        "parameters": size, "icl": median(ours), "devinterp": median(theirs),
        "ratio": median(a / b for a, b in zip(ours, theirs, strict=True)),
        "noise": 1000 * median(noise) / NOISES, "randn": 1000 * median(randn) / NOISES,
    }  # fmt: skip


def peak(width: int) -> float:
    """Vectors of the parameters per chain that a short run of the automatic setting adds to the process, at most."""
    from icl.sampling import tuning

    model = model_of(width)
    objective = ModuleObjective(model.module, model.loss_fn)
    objective.losses_and_gradients(objective.anchor[None], model.batch)
    student_factor(7)  # loads SciPy, which is no vector of the parameters
    tuning.MIN_PILOT_STEPS = 12
    config = AUTOMATIC.model_copy(
        update={"num_draws": 11, "num_burnin_steps": 2, "target_error": None, "eval_dataset_size": 1000}
    )
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark is what is held now
    before = high_water()
    estimate_llc_of(objective, Inputs([model.batch]), config)
    return (high_water() - before) / (4 * objective.anchor.numel() * config.num_chains)


def high_water() -> int:
    """Most bytes that this process held at once (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def draw(table: pd.DataFrame, path: Path) -> None:
    """The figure of cost against size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    curves = {
        "icl": ("icl, one gradient", "-"),
        "devinterp": ("devinterp, one gradient", "-"),
        "noise": ("icl, one vector of noise", ":"),
        "randn": ("torch.randn", ":"),
    }
    for column, (label, style) in curves.items():
        axes.loglog(table["parameters"], table[column], marker="o", label=label, linestyle=style)
    axes.set(xlabel="parameters", ylabel="processor ms per chain")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("data/llc_accuracy"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.peak is not None:
        print(peak(options.peak))
        return 0
    rows = []
    for width in WIDTHS:
        row = times(width, options.repetitions)
        if width > 200:  # below, what a process holds besides hides it
            command = [sys.executable, "-m", "benchmarks.llc.size", "--peak", str(width)]
            row["vectors_per_chain"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        print(row, flush=True)
    table = pd.DataFrame(rows)
    write_table(table, options.output / "size.csv", digits=4)
    if options.figure is not None:
        draw(table, options.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
