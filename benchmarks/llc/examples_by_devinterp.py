"""The estimates of examples/ as they are written with devinterp 2.0.1, on the same models, losses and data.

devinterp takes a Hugging Face data set of token rows, and a loss per predicted token. For other data a row is the number of a sample
and a 0, and the loss looks the sample up. Batches that are a function of the step are put in a data set of the steps that are met.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import xarray as xr
from torch import nn


@dataclass(frozen=True)
class Given:
    """The settings of the sampler.

    Attributes:
        steps: gradients of each chain.
        path: where draws are stored.
    """

    nbeta: float
    gamma: float
    epsilon: float
    chains: int
    steps: int
    path: Path


def deep_linear(example: ModuleType, model: nn.Module, given: Given) -> xr.Dataset:
    from datasets import Dataset
    from devinterp.slt.llc import llc

    ((xs, ys),) = example.data()
    rows = Dataset.from_dict({"input_ids": [[index, 0] for index in range(len(xs))]}).with_format("torch")

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return (model(xs[ids[:, 0]]) - ys[ids[:, 0]]).square().sum(dim=-1, keepdim=True)

    return llc(
        model, rows, {}, loss_fn=loss, batch_size=len(xs), num_init_loss_batches=1, lr=given.epsilon, n_beta=given.nbeta,
        localization=given.gamma, num_chains=given.chains, num_draws=given.steps, output_path=given.path,
    )  # fmt: skip


def superposition(example: ModuleType, model: nn.Module, given: Given) -> xr.Dataset:
    from datasets import Dataset
    from devinterp.slt.llc import llc

    xs = torch.cat(example.data())
    rows = Dataset.from_dict({"input_ids": [[index, 0] for index in range(len(xs))]}).with_format("torch")

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return (model(xs[ids[:, 0]]) - xs[ids[:, 0]]).square().sum(dim=-1, keepdim=True)

    return llc(
        model, rows, {}, loss_fn=loss, batch_size=256, num_init_loss_batches=16, lr=given.epsilon, n_beta=given.nbeta,
        localization=given.gamma, num_chains=given.chains, num_draws=given.steps, output_path=given.path,
    )  # fmt: skip


def modular_addition(example: ModuleType, model: nn.Module, given: Given) -> xr.Dataset:
    from datasets import Dataset
    from devinterp.slt.llc import llc

    ((pairs, sums),) = example.data()
    rows = Dataset.from_dict({"input_ids": [[index, 0] for index in range(len(pairs))]}).with_format("torch")

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(pairs[ids[:, 0]]), sums[ids[:, 0]], reduction="none")[:, None]

    return llc(
        model, rows, {}, loss_fn=loss, batch_size=len(pairs), num_init_loss_batches=1, lr=given.epsilon, n_beta=given.nbeta,
        localization=given.gamma, num_chains=given.chains, num_draws=given.steps, output_path=given.path,
    )  # fmt: skip


def digits(example: ModuleType, model: nn.Module, given: Given) -> xr.Dataset:
    from datasets import Dataset
    from devinterp.slt.llc import llc

    images, labels = example.data().dataset.tensors
    rows = Dataset.from_dict({"input_ids": [[index, 0] for index in range(len(labels))]}).with_format("torch")

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images[ids[:, 0]]), labels[ids[:, 0]], reduction="none")[:, None]

    return llc(
        model, rows, {}, loss_fn=loss, batch_size=128, num_init_loss_batches=14, lr=given.epsilon, n_beta=given.nbeta,
        localization=given.gamma, num_chains=given.chains, num_draws=given.steps, output_path=given.path,
    )  # fmt: skip


def gpt2(example: ModuleType, model: nn.Module, given: Given) -> xr.Dataset:
    from datasets import Dataset
    from devinterp.slt.llc import llc

    tokens = torch.cat([example.batches(step)["input_ids"] for step in range(given.steps)])
    rows = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    return llc(
        model, rows, {}, batch_size=16, shuffle=False, num_init_loss_batches=given.steps, lr=given.epsilon, n_beta=given.nbeta,
        localization=given.gamma, num_chains=given.chains, num_draws=given.steps, output_path=given.path,
    )  # fmt: skip


def own_checkpoints(example: ModuleType, given: Given, steps: Sequence[int]) -> dict[int, xr.Dataset]:
    from datasets import Dataset
    from devinterp.slt.llc import llc

    ((xs, ys),) = example.batches()
    rows = Dataset.from_dict({"input_ids": [[index, 0] for index in range(len(xs))]}).with_format("torch")

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return (model(xs[ids[:, 0]]) - ys[ids[:, 0]]).square()

    found = {}
    for step in steps:
        model = example.network()
        model.load_state_dict(torch.load(f"runs/step_{step}.pt"))
        found[step] = llc(
            model, rows, {}, loss_fn=loss, batch_size=len(xs), num_init_loss_batches=1, lr=given.epsilon, n_beta=given.nbeta,
            localization=given.gamma, num_chains=given.chains, num_draws=given.steps, output_path=given.path / str(step),
        )  # fmt: skip
    return found
