"""Addition modulo a prime: a small network that first memorises and later generalises, with its coefficient along the way."""

import copy
import sys

import torch
from torch import nn

from icl.evals import cross_entropy_loss as loss
from icl.sampling import LLCResult, SamplerConfig, estimate_llc

PRIME = 23


def data(test: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four fifths of all pairs with their sums, or the others."""
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    order = torch.randperm(PRIME**2, generator=torch.Generator().manual_seed(0))
    chosen = pairs[order.tensor_split([int(0.8 * PRIME**2)])[test]]
    return [(chosen, chosen.sum(dim=1) % PRIME)]


def trained(quick: bool = False) -> dict[int, nn.Module]:
    """Step -> model, along the training."""
    torch.manual_seed(0)
    embedding = nn.Embedding(PRIME, 24)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, PRIME))
    (batch,), steps, kept = data(), 60 if quick else 3000, {}
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1.0)
    for step in range(steps + 1):
        if step in (steps // 6, steps // 2, steps):
            kept[step] = copy.deepcopy(model)
        optimiser.zero_grad()
        loss(model, batch).backward()
        optimiser.step()
    return kept


def estimate(model: nn.Module, quick: bool = False) -> LLCResult:
    draws = 10 if quick else 500
    config = SamplerConfig(num_chains=4, num_draws=draws, num_burnin_steps=draws // 2, gamma=100.0, init_seed=0)
    return estimate_llc(model, loss, data(), config)


def main(quick: bool = False) -> list[tuple[int, float, float, float]]:
    found, ((pairs, sums),) = [], data(test=True)
    for step, model in trained(quick).items():
        right = float((model(pairs).argmax(dim=1) == sums).float().mean())
        result = estimate(model, quick)
        found.append((step, right, result.llc_mean, result.llc_mcse))
        print(
            f"step {step}: test accuracy {right:.2f}, LLC {result.llc_mean:.1f} ± {result.llc_mcse:.1f}: {result.verdict.text}"
        )
    return found


if __name__ == "__main__":
    main("--quick" in sys.argv)
