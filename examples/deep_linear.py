"""A deep linear network of reduced rank: the estimate beside the coefficient that is known (Aoyagi 2024)."""

import sys

import torch
from torch import nn

from icl.sampling import LLCResult, SamplerConfig, estimate_llc
from icl.sampling.truth import deep_linear_coefficient

INPUTS, HIDDEN, OUTPUTS, RANK, SIZE = 5, 4, 3, 1, 1000


def trained(quick: bool = False) -> dict[int, nn.Module]:
    """Step -> model. The network is at a minimum by construction, so nothing is trained."""
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False), nn.Linear(HIDDEN, OUTPUTS, bias=False))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
            weight[:RANK, :RANK] = torch.eye(RANK)
    return {0: model}


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    xs = torch.randn(SIZE, INPUTS, generator=draw)
    ys = trained()[0](xs).detach() + 0.5**0.5 * torch.randn(SIZE, OUTPUTS, generator=draw)
    return [(xs, ys)]


def loss(predict, batch):
    return (predict(batch[0]) - batch[1]).square().sum(dim=-1).mean()


def estimate(model: nn.Module, quick: bool = False) -> LLCResult:
    draws = 100 if quick else 4000
    config = SamplerConfig(num_chains=4, num_draws=draws, num_burnin_steps=draws, eval_dataset_size=SIZE, init_seed=0)
    return estimate_llc(model, loss, data(), config)


def known() -> float:
    return deep_linear_coefficient((INPUTS, HIDDEN, OUTPUTS), RANK)[0]


def main(quick: bool = False) -> tuple[float, float, str]:
    result = estimate(trained()[0], quick)
    print(f"estimate {result.llc_mean:.2f} ± {result.llc_mcse:.2f}, known {known():.2f}: {result.verdict.text}")
    return result.llc_mean, known(), result.verdict.text


if __name__ == "__main__":
    main("--quick" in sys.argv)
