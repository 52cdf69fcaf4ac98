"""Loss and gradient of many models at once, by every engine in every precision: `python -m benchmarks.speed.gpu_engines --output FOLDER`.

Engines: PyTorch operation by operation, PyTorch compiled (`torch.compile`), and the fused kernel (`icl.engine.fused`). Each is
replayed as one CUDA graph. Sizes: 5 and 64 seeds on batches of their own (256 sequences), 10 and 160 chains on one batch (1024).
Every engine is a process, because compiling takes up to a minute and can be done side by side. Timings are taken one after the
other, under a lock. An engine that is off by more than its precision allows is not timed.

`icl` takes the fused kernel only if ICL_FUSED=1 is set. What is measured here decides whether that should be the default.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.speed import cases
from icl.devices import end_of_graph, resolve_device
from icl.engine import batched_loss_and_grad, matmul_precision
from icl.engine.capture import Replayed
from icl.engine.paths import BatchedLossAndGrad
from icl.model import flatten, initial_parameters, predict, unflatten
from icl.storage.files import write_atomically

ENGINES = ("torch", "compiled", "fused")
ALLOWED = {"highest": 1e-5, "tf32x3": 1e-5, "tf32": 5e-3}
"""Precision -> largest norm of a gradient's error, relative to the gradient's."""
SIZES = {
    "5 seeds": (5, 256, False), "64 seeds": (64, 256, False), "10 chains": (10, 1024, True), "160 chains": (160, 1024, True),
}  # fmt: skip
SHORT = {"2 seeds": (2, 8, False), "3 chains": (3, 8, True)}
PATIENCE_S = 300


def engine(name: str, precision: Any, device: torch.device) -> BatchedLossAndGrad:
    """Loss and gradient of the paper's shape."""
    if name == "fused":
        from icl.engine.fused import fused_loss_and_grad

        return partial(fused_loss_and_grad, cases.PAPER, precision=precision)
    work = compiled() if name == "compiled" else partial(batched_loss_and_grad, cases.PAPER)

    def run(flats: Tensor, xs: Tensor, ys: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with matmul_precision(precision, device):
            return work(flats, xs, ys, token_weights)

    return run


def _token_losses(flats: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    own = 0 if xs.ndim == 4 else None
    many = torch.vmap(partial(predict, cases.PAPER), in_dims=(0, own, own))
    return (many(unflatten(cases.PAPER, flats), xs, ys) - ys).square().mean(dim=(1, 3))


def compiled() -> BatchedLossAndGrad:
    """The same function with its forward pass compiled by PyTorch, which compiles the backward pass with it."""
    token_losses = torch.compile(_token_losses, dynamic=False)

    def run(flats: Tensor, xs: Tensor, ys: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        leaf = flats.detach().requires_grad_()
        losses = token_losses(leaf, xs, ys)
        (gradients,) = torch.autograd.grad(losses.mean(dim=1).sum(), leaf)
        return losses.detach(), gradients

    return run


def inputs(members: int, batch: int, shared: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (E, P) and normal data."""
    several = torch.stack([flatten(initial_parameters(cases.PAPER, seed)) for seed in range(min(members, 5))])
    generator, lead = torch.Generator().manual_seed(1), (batch,) if shared else (members, batch)
    xs, ys = (torch.randn(*lead, 8, size, generator=generator) for size in (4, 1))
    return several[torch.arange(members) % len(several)].to(device), xs.to(device), ys.to(device)


def error_of(run: BatchedLossAndGrad, device: torch.device) -> float:
    """Norm of the gradient's error, relative to the gradient in float64."""
    flats, xs, ys = inputs(2, 40, False, device)
    _, ours = run(flats, xs, ys, None)
    _, exact = batched_loss_and_grad(cases.PAPER, *(each.cpu().double() for each in (flats, xs, ys)))
    return float((ours.cpu() - exact).norm() / exact.norm())


def milliseconds(run: BatchedLossAndGrad, given: tuple[Tensor, ...], device: torch.device, seconds: float) -> float:
    """Of one call, replayed for about so long."""
    replayed = Replayed(run)

    def timed(count: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            replayed(*given)
        _wait(device)
        return time.perf_counter() - start

    timed(2)
    count = max(2, int(seconds * 4 / timed(4)))
    return 1e3 * timed(count) / count


def _wait(device: torch.device) -> None:
    end_of_graph(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, precision: str, device: torch.device, short: bool, lock: Path) -> list[dict[str, Any]]:
    """The rows of one engine in one precision."""
    run = engine(name, precision, device)
    row = {"engine": name, "precision": precision}
    try:
        error = error_of(run, device)
    except Exception as problem:  # an engine that does not compile must not hide the others
        return [row | {"problem": " ".join(str(problem).split())[:300]}]
    if not error <= ALLOWED[precision]:
        return [row | {"error": error, "problem": "too far from float64"}]
    rows = []
    held = os.open(lock, os.O_RDONLY)  # a folder can be locked too
    for size, spec in (SHORT if short else SIZES).items():
        given = inputs(*spec, device)
        try:
            run(*given, None)  # it may compile for this size
            fcntl.flock(held, fcntl.LOCK_EX)
            taken = milliseconds(run, given, device, 0.02 if short else 1.0)
            rows.append(row | {"error": error, "size": size, "ms": taken})
        except Exception as problem:
            rows.append(row | {"error": error, "size": size, "problem": " ".join(str(problem).split())[:300]})
        finally:
            fcntl.flock(held, fcntl.LOCK_UN)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def all_engines(device: torch.device, short: bool) -> pd.DataFrame:
    """Every engine in every precision; those that need cuda are left out elsewhere."""
    names = ENGINES if device.type == "cuda" else ENGINES[:1]
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for name in names:
            for precision in ALLOWED:
                words = [
                    "--engine",
                    name,
                    "--precision",
                    precision,
                    "--device",
                    str(device),
                    "--lock",
                    folder,
                ]
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.speed.gpu_engines",
                    *words,
                    *(["--short"] if short else []),
                ]
                jobs.append((name, precision, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        rows: list[dict[str, Any]] = []
        for name, precision, job in jobs:
            try:
                out, _ = job.communicate(timeout=PATIENCE_S)
                rows += json.loads(out.splitlines()[-1])
            except (subprocess.TimeoutExpired, IndexError, ValueError) as problem:
                job.kill()
                rows.append({"engine": name, "precision": precision, "problem": f"{type(problem).__name__}"})
    return pd.DataFrame(rows)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that all of it works")
    parser.add_argument("--output", type=Path, help="folder of gpu-engines.csv; default: only printed")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # one process of the measurement
    parser.add_argument("--precision", choices=list(ALLOWED), help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    device = resolve_device(options.device)
    if options.engine:
        print(json.dumps(measure(options.engine, options.precision, device, options.short, options.lock)))
        return 0
    table = all_engines(device, options.short)
    print(table.to_string(index=False))
    if options.output:
        write_atomically(options.output / "gpu-engines.csv", table.to_csv(index=False).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
