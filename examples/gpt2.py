"""A GPT-2 made from a configuration, trained on bytes of Python's standard library; needs `pip install transformers`."""

import sys
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from icl.evals import cross_entropy_loss as loss
from icl.sampling import LLCResult, SamplerConfig, estimate_llc


@cache
def text() -> torch.Tensor:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)))


def batches(step: int) -> dict[str, torch.Tensor]:
    """16 stretches of the text: a function of the step."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text()) - 64, (16,), generator=draw)
    return {"input_ids": torch.stack([text()[start : start + 64] for start in starts])}


def trained(quick: bool = False) -> dict[int, nn.Module]:
    """Step -> model."""
    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model, steps = GPT2LMHeadModel(settings), 5 if quick else 400
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        optimiser.zero_grad()
        loss(model, batches(10**6 + step)).backward()
        optimiser.step()
    return {steps: model.eval()}


def estimate(model: nn.Module, quick: bool = False) -> LLCResult:
    draws = 20 if quick else 150
    config = SamplerConfig(num_chains=2, num_draws=draws, epsilon=1e-4, gamma=100.0, nbeta=30.0, init_seed=0)
    return estimate_llc(model, loss, batches, config)


def main(quick: bool = False) -> tuple[float, float, float]:
    (model,) = trained(quick).values()
    result = estimate(model, quick)
    print(f"loss {result.init_loss:.3f}, LLC {result.llc_mean:.1f} ± {result.llc_mcse:.1f}: {result.verdict.text}")
    return result.init_loss, result.llc_mean, result.llc_mcse


if __name__ == "__main__":
    main("--quick" in sys.argv)
