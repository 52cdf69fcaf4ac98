"""The toy model of superposition (Elhage et al. 2022): x -> ReLU(WᵀW x + b) on sparse features, along its training."""

import copy
import sys

import torch
from torch import nn

from icl.sampling import LLCResult, SamplerConfig, estimate_llc


class Superposition(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(hidden, features, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        return torch.relu(xs @ self.weight.T @ self.weight + self.bias)


def loss(predict, xs):
    return (predict(xs) - xs).square().sum(dim=-1).mean()


def data(first: int = 0, count: int = 16) -> list[torch.Tensor]:
    """Batches of 256 sparse samples."""
    draws = [torch.Generator().manual_seed(first + step) for step in range(count)]
    pairs = [torch.rand(2, 256, 6, generator=draw) for draw in draws]
    return [values * (chosen < 0.1) for values, chosen in pairs]


def trained(quick: bool = False) -> dict[int, nn.Module]:
    model, steps, kept = Superposition(6, 2), 300 if quick else 6000, {}
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps + 1):
        if step in (steps // 10, steps):
            kept[step] = copy.deepcopy(model)
        optimiser.zero_grad()
        loss(model, data(10**6 + step, 1)[0]).backward()
        optimiser.step()
    return kept


def estimate(model: nn.Module, quick: bool = False) -> LLCResult:
    draws = 20 if quick else 4000
    config = SamplerConfig(num_chains=4, num_draws=draws, num_burnin_steps=draws // 8, nbeta=100.0, init_seed=0)
    return estimate_llc(model, loss, data(), config)


def main(quick: bool = False) -> list[tuple[int, float, float, float]]:
    found = {step: estimate(model, quick) for step, model in trained(quick).items()}
    for step, result in found.items():
        print(f"step {step}: LLC {result.llc_mean:.2f} ± {result.llc_mcse:.2f}: {result.verdict.text}")
    return [(step, result.init_loss, result.llc_mean, result.llc_mcse) for step, result in found.items()]


if __name__ == "__main__":
    main("--quick" in sys.argv)
