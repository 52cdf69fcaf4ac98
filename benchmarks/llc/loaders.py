"""What the default settings answer on a `DataLoader`, at batches from 16 samples to all of them.

    python -m benchmarks.llc.loaders [--quick] [--output data/llc_accuracy]

`estimate_llc(model, loss_fn, loader)` with no settings at all, as a newcomer calls it: two linear models, a small network on scikit-learn's
digits, and a small GPT-2 on bytes of Python's standard library. λ̂ is compared with its value at the nβ and γ of the run on all the data:
exact for linear models, else by one long run on all the data with a quarter of the step. Rows are appended to loaders.csv as they come, and
rows that are there are not made again. The GPT-2 takes an hour.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from icl.evals import cross_entropy_loss
from icl.sampling import AUTOMATIC, SamplerConfig, estimate_llc
from icl.sampling.objective import LossFunction
from icl.sampling.result import LLCResult
from icl.storage.files import write_table

BATCHES = (16, 64, 256)
LONG = {"num_chains": 8, "num_draws": 4000, "num_burnin_steps": 2000, "target_error": None, "max_draws": None}


@dataclass(frozen=True)
class Fitted:
    """A trained model with its data.

    Attributes:
        exact: (nβ, γ) -> nβ (E[L] − L(w*)); None: it takes a long run.
    """

    name: str
    model: nn.Module
    loss_fn: LossFunction
    data: Dataset
    size: int
    exact: Callable[[float, float], float] | None = None

    def loader(self, batch: int | None) -> DataLoader:
        """A shuffling loader; None: all samples in one batch."""
        return DataLoader(
            self.data, batch_size=batch or self.size, shuffle=True, generator=torch.Generator().manual_seed(0)
        )


def half(predict: Callable[[Tensor], Tensor], batch: Sequence[Tensor]) -> Tensor:
    """Half the mean squared error."""
    return 0.5 * F.mse_loss(predict(batch[0]), batch[1])


def linear(samples: int, size: int) -> Fitted:
    """Linear regression with noise of variance 1, at its least-squares solution."""
    torch.manual_seed(size)
    inputs = torch.randn(samples, size)
    targets = inputs @ torch.randn(size, 1) + torch.randn(samples, 1)
    model = nn.Linear(size, 1, bias=False)
    model.weight.data.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    curvatures = torch.linalg.eigvalsh(inputs.double().T @ inputs.double() / samples)

    def exact(nbeta: float, gamma: float) -> float:
        return float((0.5 * nbeta * curvatures / (nbeta * curvatures + gamma)).sum())

    return Fitted(f"linear {size}, n {samples:,}", model, half, TensorDataset(inputs, targets), samples, exact)


def fit(model: nn.Module, loss_fn: LossFunction, batch: Any, steps: int, rate: float) -> nn.Module:
    """Adam on all the data, its learning rate falling to 0 by a cosine."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_fn(model, batch).mean().backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def digits(steps: int) -> Fitted:
    """A network of 64-16-10 units on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    fit(model, cross_entropy_loss, (inputs, targets), steps, 1e-2)
    return Fitted("digits, 64-16-10", model, cross_entropy_loss, TensorDataset(inputs, targets), len(inputs))


class Sequences(Dataset):
    """Rows of tokens, as a language model takes them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}


def gpt2(steps: int) -> Fitted:
    """A GPT-2 of two layers, 16 wide, on 64 stretches of 16 bytes."""
    import sysconfig

    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()[:1024]
    tokens = torch.tensor(list(text)).reshape(64, 16)
    settings = GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(settings)
    fit(model, cross_entropy_loss, {"input_ids": tokens}, steps, 3e-3)
    return Fitted("GPT-2, 2 layers of 16", model, cross_entropy_loss, Sequences(tokens), len(tokens))


def models(quick: bool) -> Iterator[Fitted]:
    """The models, made one after the other."""
    yield linear(1000, 5)
    if quick:
        return
    yield linear(10_000, 20)
    yield digits(3000)
    yield gpt2(1500)


def reference(fitted: Fitted, first: LLCResult) -> tuple[float, float]:
    """λ̂ at the nβ and γ of `first`, which ran on all the data, and its standard error."""
    if fitted.exact is not None:
        return fitted.exact(first.nbeta, first.config.localization), 0.0
    config = first.config.model_copy(update={**LONG, "epsilon": (first.config.step_size or 0.0) / 4})
    long = estimate_llc(fitted.model, fitted.loss_fn, fitted.loader(None), config)
    return long.llc_mean, long.llc_mcse


def row_of(fitted: Fitted, batch: int | None, config: SamplerConfig) -> tuple[dict[str, Any], LLCResult]:
    """One estimate, without its reference."""
    started = time.monotonic()
    result = estimate_llc(fitted.model, fitted.loss_fn, fitted.loader(batch), config)
    effort = result.effort
    return {
        "model": fitted.name, "batch": batch or fitted.size, "estimate": result.llc_mean, "mcse": result.llc_mcse,
        "nbeta": result.nbeta, "gamma": result.config.localization, "epsilon": result.config.step_size,
        "steps": result.config.num_steps, "control": bool(result.run.corrections.any()), "seconds": time.monotonic() - started,
        "healthy": result.verdict.trusted, "verdict": result.verdict.text, "needs": result.needs.text if effort else "",
    }, result  # fmt: skip


def run(output: Path, quick: bool) -> pd.DataFrame:
    """All rows, those that are there already included."""
    path = output / "loaders.csv"
    rows = pd.read_csv(path, keep_default_na=False).to_dict("records") if path.exists() else []
    done = {(row["model"], row["batch"]) for row in rows}
    config = (
        AUTOMATIC.model_copy(update={"num_draws": 100, "num_burnin_steps": 50, "target_error": None})
        if quick
        else AUTOMATIC
    )
    sizes = BATCHES[:1] if quick else BATCHES
    for fitted in models(quick):
        known = next(
            ((row["reference"], row["reference_error"]) for row in rows if row["model"] == fitted.name),
            (math.nan, math.nan),
        )
        for batch in (None, *(each for each in sizes if each < fitted.size)):
            if (fitted.name, batch or fitted.size) in done:
                continue
            row, result = row_of(fitted, batch, config)
            if batch is None:
                known = reference(fitted, result)
            rows.append(row | {"reference": known[0], "reference_error": known[1]})
            write_table(pd.DataFrame(rows), path, digits=5)
            print(
                f"{row['model']}, batch {row['batch']}: {row['estimate']:.3g} ± {row['mcse']:.2g} for {known[0]:.3g} "
                f"± {known[1]:.2g}, γ {row['gamma']:.3g}, {row['seconds']:.0f} s: {row['verdict']}",
                flush=True,
            )
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one model and short chains, for a test that it runs")
    parser.add_argument("--output", type=Path, default=Path("data/llc_accuracy"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = run(options.output, options.quick)
    print(table.drop(columns=["verdict", "needs"]).to_string(index=False, float_format="%.3g"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
