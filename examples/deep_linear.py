"""A deep linear network of reduced rank: the estimate beside the coefficient that is known (Aoyagi 2024)."""

import sys

import torch
from torch import nn

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.truth import deep_linear_coefficient


def main(quick: bool = False) -> tuple[float, float, str]:
    inputs, hidden, outputs, rank, n = 5, 4, 3, 1, 1000
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs, bias=False))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
            weight[:rank, :rank] = torch.eye(rank)
    xs = torch.randn(n, inputs, generator=draw)
    ys = model(xs).detach() + 0.5**0.5 * torch.randn(n, outputs, generator=draw)

    def loss(predict, batch):
        return (predict(batch[0]) - batch[1]).square().sum(dim=-1).mean()

    draws = 100 if quick else 4000
    config = SamplerConfig(num_chains=4, num_draws=draws, num_burnin_steps=draws, eval_dataset_size=n, init_seed=0)
    result = estimate_llc(model, loss, [(xs, ys)], config)
    known = deep_linear_coefficient((inputs, hidden, outputs), rank)[0]
    print(f"estimate {result.llc_mean:.2f} ± {result.llc_mcse:.2f}, known {known:.2f}: {result.verdict.text}")
    return result.llc_mean, known, result.verdict.text


if __name__ == "__main__":
    main("--quick" in sys.argv)
