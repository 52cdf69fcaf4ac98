"""The whole paper on one GPU: `python -m benchmarks.gpu [--short] [--device cuda]`.

1. Equality first: losses of the batched engine against float64 on the CPU, at the paper's sizes.
2. Five seeds × 500,000 steps of the paper's model, in one batch; the goal is 5 minutes.
3. The published LLC curve of one seed: 190 checkpoints × 10 chains × 5000 draws, batch 1024; the goal is 15 minutes.

Without `--whole` a part of each is timed and scaled to the full length, which the table says. Times, the share of the
measured peak of float32 matrix products and the device's name go to benchmarks/results/gpu-<device>.csv.
`--short` runs tiny sizes, on any device, and writes nothing.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from benchmarks.speed import cases
from icl.config import TrainingConfig
from icl.devices import end_of_graph, resolve_device
from icl.engine import batched_loss_and_grad, loss_and_grad, mse_loss
from icl.estimation.estimate import AT_ONCE
from icl.model import InContextRegressionTransformer, flatten, initial_parameters
from icl.sampling import PUBLISHED, Inputs, estimate_llcs
from icl.sampling.chains import chains_that_fit
from icl.sampling.transformer_objective import make_objective
from icl.storage.files import write_table
from icl.subjects.regression import sampling_batches
from icl.tasks import BLOCK, RegressionTask
from icl.training.accelerator import AcceleratorStepper

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Sizes:
    """What is run; the defaults are the paper's."""

    seeds: int = 5
    train_steps: int = 500_000
    train_batch: int = 256
    checkpoints: int = 190
    chains: int = 10
    draws: int = 5000
    sample_batch: int = 1024
    dataset: int = 2**20


SHORT = Sizes(seeds=2, train_steps=40, train_batch=16, checkpoints=2, chains=2, draws=6, sample_batch=16, dataset=64)


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was given."""
    end_of_graph(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_equality(device: torch.device, sizes: Sizes) -> float:
    """Largest relative error (per parameter, of its largest entry) of the batched float32 gradient against float64.

    Raises:
        RuntimeError: it is above 1e-4.
    """
    shape, law = cases.PAPER, RegressionTask(4, 8, cases.NOISE_VARIANCE)
    flats = torch.stack([flatten(initial_parameters(shape, seed)) for seed in range(sizes.seeds)])
    xs, ys = law.sample(cases.Stream(0, "gpu"), 0, sizes.seeds * sizes.train_batch)
    xs, ys = (part.unflatten(0, (sizes.seeds, -1)) for part in (xs, ys))
    _, gradients = batched_loss_and_grad(shape, flats.to(device), xs.to(device), ys.to(device))
    worst = 0.0
    for flat, x, y, gradient in zip(flats, xs, ys, gradients.cpu(), strict=True):
        _, exact = loss_and_grad(shape, flat.double(), x.double(), y.double())
        parts = zip(*(cases.unflatten(shape, each).values() for each in (gradient, exact)), strict=True)
        worst = max(worst, *(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in parts))
    if not worst < 1e-4:
        raise RuntimeError(f"gradients on {device} are off by {worst:.1e}; nothing was timed")
    return worst


def peak_flops(device: torch.device, size: int) -> float:
    """Floating point operations per second of a square float32 product, in the precision that training uses."""
    a, b = torch.randn(2, size, size, device=device)
    torch.mm(a, b)
    wait_for(device)
    start, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        torch.mm(a, b)
    wait_for(device)
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def time_training(device: torch.device, sizes: Sizes, steps: int) -> float:
    """Seconds per step of all seeds, warm-up and capture left out."""
    configs = [training_config(seed, sizes) for seed in range(sizes.seeds)]
    engine = AcceleratorStepper(configs, 0, [{}] * len(configs), device)
    engine.run(2)
    wait_for(device)
    start, done = time.perf_counter(), 0
    while done < steps:
        losses = engine.run(count := min(BLOCK, steps - done))
        done += count
        if not torch.isfinite(losses).all():
            raise RuntimeError("the loss is not finite")
    return (time.perf_counter() - start) / steps


def training_config(seed: int, sizes: Sizes) -> TrainingConfig:
    """The paper's run of one seed."""
    task = {
        "task_size": 4, "max_examples": 8, "num_tasks": "inf", "noise_variance": cases.NOISE_VARIANCE, "embed_size": 64,
        "mlp_size": 64, "num_heads": 4, "num_layers": 2, "model_seed": seed,
    }  # fmt: skip
    data = {
        "task_config": task, "num_steps": sizes.train_steps, "batch_size": sizes.train_batch, "optimizer_config": {"lr": 0.003},
    }  # fmt: skip
    return TrainingConfig.parse(data).resolved()


def time_sampling(device: torch.device, sizes: Sizes, draws: int) -> tuple[float, int]:
    """Seconds per step of the chains of all checkpoints that fit the device at once, and how many those are."""
    law = RegressionTask(4, 8, cases.NOISE_VARIANCE)
    config = PUBLISHED.model_copy(
        update={
            "num_chains": sizes.chains, "grad_batch_size": sizes.sample_batch, "eval_dataset_size": sizes.dataset, "init_seed": 0,
        }
    )  # fmt: skip
    models = [
        InContextRegressionTransformer(**asdict(cases.PAPER), seed=seed).to(device) for seed in range(sizes.checkpoints)
    ]
    batches = sampling_batches(law, config, 0, device)[0]
    fitting = chains_that_fit(config, make_objective(models[0], mse_loss, config), batches(0))
    together = min(sizes.checkpoints, AT_ONCE, max(1, fitting // sizes.chains))

    def work(count: int) -> None:
        list(
            estimate_llcs(models[:together], mse_loss, Inputs(batches), config.model_copy(update={"num_draws": count}))
        )
        wait_for(device)

    work(3)
    start = time.perf_counter()
    work(draws)
    return (time.perf_counter() - start) / draws, together


def measure(device: torch.device, sizes: Sizes, train_steps: int, draws: int) -> pd.DataFrame:
    """One row for training and one for sampling: measured, and scaled to the full length."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(
        f"{name}, torch {torch.__version__}; gradients within {check_equality(device, sizes):.1e} of float64",
        flush=True,
    )
    peak = peak_flops(device, 512 if sizes is SHORT else 8192)
    rows = []
    sampling_s, together = time_sampling(device, sizes, draws)
    print(f"chains of {together} checkpoints at once", flush=True)
    for what, step_s, steps, timed, flops in (
        (
            f"{sizes.seeds} seeds x {sizes.train_steps} steps", time_training(device, sizes, train_steps), sizes.train_steps,
            train_steps, sizes.seeds * cases.step_flops(cases.PAPER, sizes.train_batch),
        ),
        (
            f"LLC of {sizes.checkpoints} checkpoints x {sizes.chains} chains x {sizes.draws} draws",
            sampling_s, math.ceil(sizes.checkpoints / together) * sizes.draws, draws,
            together * sizes.chains * cases.step_flops(cases.PAPER, sizes.sample_batch),
        ),
    ):  # fmt: skip
        rows.append(
            {
                "what": what, "device": name, "steps_timed": timed, "step_ms": 1e3 * step_s, "minutes": step_s * steps / 60,
                "scaled": timed < steps, "utilisation": flops / step_s / peak, "peak_tflops": peak / 1e12,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def main(words: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="tiny sizes, on any device; nothing is written")
    parser.add_argument("--whole", action="store_true", help="time the whole length instead of scaling")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<i>, xla or cpu")
    arguments = parser.parse_args(words)
    device = resolve_device("cpu" if arguments.short and arguments.device == "cuda" else arguments.device)
    if arguments.short:
        results = measure(device, SHORT, SHORT.train_steps - 2, SHORT.draws)
    else:
        sizes = Sizes()
        whole = arguments.whole
        results = measure(device, sizes, sizes.train_steps - 2 if whole else 20_000, sizes.draws if whole else 1000)
        slug = "-".join("".join(c if c.isalnum() else " " for c in results["device"].iloc[0]).lower().split())
        write_table(results, RESULTS / f"gpu-{slug}.csv", digits=6)
    print(results.to_string(index=False, float_format="%.4g"))
    return results


if __name__ == "__main__":
    main()
