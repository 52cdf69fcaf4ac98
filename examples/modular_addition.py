"""Addition modulo a prime: a small network that first memorises and later generalises, with its coefficient along the way."""

import copy
import sys

import torch
from torch import nn

from icl.evals import cross_entropy_loss
from icl.sampling import SamplerConfig, estimate_llc

PRIME = 23


class Adder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PRIME, 24)
        self.layers = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, PRIME))

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embedding(pairs).flatten(1))


def main(quick: bool = False) -> list[tuple[int, float, float, float]]:
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    sums, order = pairs.sum(dim=1) % PRIME, torch.randperm(PRIME**2)
    train, test = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
    data = [(pairs[train], sums[train])]
    model, steps, found = Adder(), 60 if quick else 3000, []
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1.0)
    config = SamplerConfig(num_chains=2, num_draws=10 if quick else 200, epsilon=1e-4, gamma=10.0, init_seed=0)
    for step in range(steps + 1):
        if step in (steps // 6, steps // 2, steps):
            right = float((model(pairs[test]).argmax(dim=1) == sums[test]).float().mean())
            result = estimate_llc(copy.deepcopy(model), cross_entropy_loss, data, config)
            found.append((step, right, result.llc_mean, result.llc_mcse))
            print(f"step {step}: test accuracy {right:.2f}, LLC {result.llc_mean:.1f} ± {result.llc_mcse:.1f}")
        optimiser.zero_grad()
        cross_entropy_loss(model, data[0]).backward()
        optimiser.step()
    return found


if __name__ == "__main__":
    main("--quick" in sys.argv)
