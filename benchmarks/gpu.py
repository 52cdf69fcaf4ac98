"""What one GPU does with the paper, in a few minutes: `python -m benchmarks.gpu [--minutes 8] [--device cuda]`.

1. Equality: losses and gradients of the batched step against float64 on the CPU, and a captured step against the plain one.
2. Training: milliseconds a step with 5 and with 64 seeds in one batch.
3. Sampling: milliseconds a step with 1, 10 and 160 chains under the published setting.
4. Where the time goes: kernels by time, and the share of the time in which none runs.
5. Loss and gradient by every engine in every precision (`benchmarks.speed.gpu_engines`).
6. Scaled times: five seeds × 500,000 steps (the goal is 5 minutes), and the published curve of one seed, 190 checkpoints ×
   10 chains × 5000 draws (the goal is 15 minutes). They are step times multiplied by step counts, not measurements.

Needs torch, numpy, pandas and pydantic alone. What was measured is written after every part, so that the program can be
stopped at any moment. `--short` runs tiny sizes on any device, to see that all of it works.
"""

import argparse
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.speed import cases
from benchmarks.speed.gpu_engines import all_engines
from icl.config import TrainingConfig
from icl.devices import end_of_graph, resolve_device
from icl.engine import batched_loss_and_grad, loss_and_grad, mse_loss
from icl.model import InContextRegressionTransformer, flatten, initial_parameters
from icl.sampling import PUBLISHED, Inputs, estimate_llcs
from icl.storage.files import write_atomically
from icl.subjects.regression import sampling_batches
from icl.tasks import BLOCK, RegressionTask
from icl.training.accelerator import AcceleratorStepper

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4
KERNELS = 12
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is run; the defaults are the paper's."""

    seeds: tuple[int, ...] = (5, 64)
    chains: tuple[tuple[int, int], ...] = ((1, 1), (1, 10), (16, 10))  # checkpoints x chains of each
    train_steps: int = 500_000
    train_batch: int = 256
    checkpoints: int = 190
    draws: int = 5000
    sample_batch: int = 1024
    dataset: int = 2**20
    peak: int = 8192


SHORT = Sizes((2, 3), ((1, 1), (1, 2), (2, 2)), train_steps=2000, train_batch=16, sample_batch=16, dataset=64, peak=256)


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was given."""
    end_of_graph(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_gradients(device: torch.device, sizes: Sizes) -> float:
    """Largest relative error (per parameter, of its largest entry) of the batched float32 gradient against float64.

    Raises:
        RuntimeError: it is above 1e-4.
    """
    shape, law, members = cases.PAPER, RegressionTask(4, 8, cases.NOISE_VARIANCE), sizes.seeds[0]
    flats = torch.stack([flatten(initial_parameters(shape, seed)) for seed in range(members)])
    xs, ys = law.sample(cases.Stream(0, "gpu"), 0, members * sizes.train_batch)
    xs, ys = (part.unflatten(0, (members, -1)) for part in (xs, ys))
    _, gradients = batched_loss_and_grad(shape, flats.to(device), xs.to(device), ys.to(device))
    worst = 0.0
    for flat, x, y, gradient in zip(flats, xs, ys, gradients.cpu(), strict=True):
        _, exact = loss_and_grad(shape, flat.double(), x.double(), y.double())
        parts = zip(*(cases.unflatten(shape, each).values() for each in (gradient, exact)), strict=True)
        worst = max(worst, *(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in parts))
    return _held(worst, TOLERANCE, f"gradients on {device}")


def check_capture(device: torch.device, sizes: Sizes) -> float:
    """Largest relative difference of the losses of 20 captured steps from those of plain ones.

    Raises:
        RuntimeError: it is above 1e-3.
    """
    configs = [training_config(seed, sizes) for seed in range(sizes.seeds[0])]
    captured, plain = (
        AcceleratorStepper(configs, 0, [{}] * len(configs), device, capture=capture).run(20)
        for capture in (True, False)
    )
    return _held(float(((captured - plain) / plain).abs().max()), 1e-3, f"captured steps on {device}")


def _held(error: float, bound: float, what: str) -> float:
    if not error < bound:
        raise RuntimeError(f"{what} are off by {error:.1e}; nothing was timed")
    return error


def peak_flops(device: torch.device, size: int, tf32: bool) -> float:
    """Floating point operations per second of a square float32 product, in full precision or in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        a, b = torch.randn(2, size, size, device=device)
        torch.mm(a, b)
        wait_for(device)
        start, repeats = time.perf_counter(), 20
        for _ in range(repeats):
            torch.mm(a, b)
        wait_for(device)
        return 2 * size**3 * repeats / (time.perf_counter() - start)
    finally:
        torch.set_float32_matmul_precision(before)


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


def stepper(device: torch.device, sizes: Sizes, members: int) -> AcceleratorStepper:
    """Training of so many seeds."""
    configs = [training_config(seed, sizes) for seed in range(members)]
    return AcceleratorStepper(configs, 0, [{}] * len(configs), device)


def sampler(device: torch.device, sizes: Sizes, models: int, chains: int) -> Callable[[int], None]:
    """Draws -> the published estimator at so many models at once, with so many chains each, without the tests of its target."""
    law = RegressionTask(4, 8, cases.NOISE_VARIANCE)
    changed = {
        "num_chains": chains, "grad_batch_size": sizes.sample_batch, "eval_dataset_size": sizes.dataset,
        "num_init_loss_batches": 1, "test_target": False,
    }  # fmt: skip
    config = PUBLISHED.model_copy(update=changed)
    shapes = asdict(cases.PAPER)
    several = [InContextRegressionTransformer(**shapes, seed=seed).to(device) for seed in range(models)]
    batches = sampling_batches(law, config, 0, device)[0]

    def work(draws: int) -> None:
        wanted = config.model_copy(update={"num_draws": draws})
        list(estimate_llcs(several, mse_loss, Inputs(batches), wanted))
        wait_for(device)

    return work


def seconds_each(work: Callable[[int], object], first: int, seconds: float) -> tuple[float, int]:
    """Seconds of one step of `work(count)`, after a first call that warms up, and how many steps were timed."""
    work(first)
    done, start = 0, time.perf_counter()
    count = first
    while done == 0 or time.perf_counter() - start < seconds / 2:
        work(count)
        done += count
        each = (time.perf_counter() - start) / done
        left = seconds - (time.perf_counter() - start)
        count = max(first, min(BLOCK, int(left / each)))
    return (time.perf_counter() - start) / done, done


def where_the_time_goes(device: torch.device, work: Callable[[], object]) -> Row:
    """Kernels by their time, and the share of the wall time in which none runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        work()
        wait_for(device)
    wall = time.perf_counter() - start
    on_device = device.type == "cuda"
    times = [
        (each.key[:120], each.count, (each.self_device_time_total if on_device else each.self_cpu_time_total) / 1e6)
        for each in profile.key_averages()
    ]
    busy = sum(seconds for _, _, seconds in times)
    longest = sorted(times, key=lambda each: -each[2])[:KERNELS]
    return {
        "wall_s": wall,
        "busy_s": busy,
        "idle_share": max(0.0, 1 - busy / wall) if on_device else None,
        "kernels": [{"name": name, "calls": calls, "seconds": seconds} for name, calls, seconds in longest],
    }


@dataclass
class Report:
    """What was measured so far, as one JSON file and one table of the timings."""

    path: Path
    facts: Row
    rows: list[Row]

    def add(self, row: Row) -> None:
        """One more row of the table, written at once."""
        self.rows.append(row)
        self.write()
        print("  ".join(f"{name}={_short(value)}" for name, value in row.items() if value is not None), flush=True)

    def write(self) -> None:
        text = json.dumps({**self.facts, "timings": self.rows}, indent=1)
        write_atomically(self.path, text.encode())
        write_atomically(self.path.with_suffix(".csv"), pd.DataFrame(self.rows).to_csv(index=False).encode())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(device: torch.device, sizes: Sizes, minutes: float, report: Report) -> None:
    """All parts in their order, in what time there is; see the module."""
    began = time.monotonic()
    report.facts["gradient_error"] = check_gradients(device, sizes)
    report.facts["capture_error"] = check_capture(device, sizes)
    report.facts["peak_tflops"] = {
        "float32": peak_flops(device, sizes.peak, False) / 1e12,
        "tf32": peak_flops(device, sizes.peak, True) / 1e12,
    }
    report.write()
    print(
        f"{report.facts['device']}, torch {torch.__version__}: gradients within {report.facts['gradient_error']:.1e} of float64, "
        f"captured steps within {report.facts['capture_error']:.1e} of plain ones",
        flush=True,
    )
    peak = report.facts["peak_tflops"]["float32"] * 1e12
    parts = len(sizes.seeds) + len(sizes.chains) + 2  # two shares for the profile and the engines

    def share(place: int) -> float:
        """Seconds for this part: an equal share of what is left."""
        return max(0.1, (60 * minutes - (time.monotonic() - began)) / (parts - place))

    for place, members in enumerate(sizes.seeds):
        training = stepper(device, sizes, members)
        step_s, timed = seconds_each(training.run, 20, share(place))
        flops = members * cases.step_flops(cases.PAPER, sizes.train_batch)
        scaled = step_s * sizes.train_steps / 60
        report.add(_row("training", f"{members} seeds", step_s, timed, flops / step_s / peak, scaled))
    for place, (models, chains) in enumerate(sizes.chains, start=len(sizes.seeds)):
        step_s, timed = seconds_each(sampler(device, sizes, models, chains), 5, share(place))
        flops = models * chains * cases.step_flops(cases.PAPER, sizes.sample_batch)
        scaled = step_s * sizes.draws * math.ceil(sizes.checkpoints / models) / 60
        report.add(_row("sampling", f"{models * chains} chains", step_s, timed, flops / step_s / peak, scaled))
    training, sampling = stepper(device, sizes, sizes.seeds[0]), sampler(device, sizes, *sizes.chains[-1])
    report.facts["profile"] = {
        "training": where_the_time_goes(device, lambda: training.run(20)),
        "sampling": where_the_time_goes(device, lambda: sampling(10)),
    }
    report.write()
    engines = all_engines(device, report.facts["short"])
    report.facts["engines"] = engines.to_dict("records")
    report.write()
    print(engines.to_string(index=False), flush=True)


def _row(what: str, size: str, step_s: float, timed: int, utilisation: float, scaled: float) -> Row:
    return {
        "what": what, "size": size, "step_ms": 1e3 * step_s, "steps_timed": timed, "share_of_float32_peak": utilisation,
        "scaled_minutes": scaled,
    }  # fmt: skip


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """TERM interrupts like Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(words: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, help="about how long it may take (default 8, with --short a few seconds)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<i>, xla or cpu")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that all of it works")
    parser.add_argument(
        "--output", type=Path, help="folder of the report; default: benchmarks/results, with --short a temporary one"
    )
    arguments = parser.parse_args(words)
    try:
        device = resolve_device(arguments.device)
    except ValueError as error:
        parser.error(f"{error}; --short --device cpu shows what the benchmark does")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    slug = "-".join("".join(each if each.isalnum() else " " for each in name).lower().split())
    folder = arguments.output or (Path(tempfile.mkdtemp(prefix="icl-gpu-")) if arguments.short else RESULTS)
    facts = {
        "device": name, "torch": torch.__version__, "python": sys.version.split()[0], "cuda": torch.version.cuda, "short": arguments.short,
        "began": datetime.now().astimezone().isoformat(timespec="seconds"),
        "scaled": "scaled_minutes is the step time times the steps of the whole: 500,000 of training; 5000 draws at 190 checkpoints",
    }  # fmt: skip
    report = Report(folder / f"gpu-{slug}.json", facts, [])
    with stopped_by_signals():
        try:
            minutes = arguments.minutes or (0.05 if arguments.short else 8)
            measure(device, SHORT if arguments.short else Sizes(), minutes, report)
        except KeyboardInterrupt:
            print(f"interrupted; what was measured is in {report.path}", file=sys.stderr)
            raise SystemExit(130) from None
    print(f"written: {report.path} and .csv")
    return report


if __name__ == "__main__":
    main()
