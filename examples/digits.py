"""Handwritten digits with a small convolutional network: a shuffling DataLoader goes in as it is."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from icl.evals import cross_entropy_loss as loss
from icl.sampling import LLCResult, SamplerConfig, estimate_llc


def data() -> DataLoader:
    images, labels = load_digits(return_X_y=True)
    pairs = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    return DataLoader(pairs, batch_size=128, shuffle=True)


def trained(quick: bool = False) -> dict[int, nn.Module]:
    """Epoch -> model."""
    torch.manual_seed(0)
    loader, epochs = data(), 1 if quick else 30
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in loader:
            optimiser.zero_grad()
            loss(model, batch).backward()
            optimiser.step()
    return {epochs: model}


def estimate(model: nn.Module, quick: bool = False) -> LLCResult:
    draws = 20 if quick else 2000
    config = SamplerConfig(num_chains=4, num_draws=draws, num_burnin_steps=draws // 4, gamma=100.0, init_seed=0)
    return estimate_llc(model, loss, data(), config)  # n comes from the loader


def main(quick: bool = False) -> tuple[float, float, float]:
    (model,) = trained(quick).values()
    result = estimate(model, quick)
    print(f"loss {result.init_loss:.4f}, LLC {result.llc_mean:.1f} ± {result.llc_mcse:.1f}: {result.verdict.text}")
    return result.init_loss, result.llc_mean, result.llc_mcse


if __name__ == "__main__":
    main("--quick" in sys.argv)
