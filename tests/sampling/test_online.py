"""The artefact of the published language model's estimator: its formula, on chains and on the published table."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.online import artefact, online_excess
from icl.sampling.presets import PRESETS

PUBLISHED = Path(__file__).parents[2] / "data" / "language-published" / "L2.csv"
NBETA = 100 / math.log(100)


def random_losses(chains: int, draws: int, loss: float) -> torch.Tensor:
    """Of chains that all begin at the same loss."""
    losses = loss + torch.rand(chains, draws, 1, generator=torch.Generator().manual_seed(chains), dtype=torch.double)
    losses[:, 0] = loss
    return losses


def loops(losses: torch.Tensor, nbeta: float) -> list[float]:
    """The estimator as it ran: chain after chain, draw after draw, a running mean, first losses in an array of zeros."""
    first, estimates = [0.0] * len(losses), []
    for chain, row in enumerate(losses[:, :, 0].tolist()):
        estimate = 0.0
        for draw, loss in enumerate(row):
            if draw == 0:
                first[chain] = loss
            else:
                estimate += (nbeta * (loss - sum(first) / len(first)) - estimate) / (draw + 1)
        estimates.append(estimate)
    return estimates


@pytest.mark.parametrize(("chains", "draws"), [(1, 7), (2, 5), (3, 11), (20, 200)])
def test_it_equals_the_estimator_as_it_ran(chains, draws):
    losses = random_losses(chains, draws, 3.7)
    found = NBETA * online_excess(losses).mean(dim=(1, 2))
    torch.testing.assert_close(found, torch.tensor(loops(losses, NBETA), dtype=torch.double), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chains", "draws"), [(2, 5), (3, 11), (20, 200)])
def test_the_formula_of_the_artefact(chains, draws):
    """λ̂ + nβ(1 − (C+1)/2C)(N−1)/N · L, and the spread of chains that agree."""
    losses, loss = random_losses(chains, draws, 3.7), 3.7
    standard = NBETA * (losses.mean(dim=(1, 2)) - loss)
    raw = NBETA * online_excess(losses).mean(dim=(1, 2))
    added, spread = artefact(NBETA, chains, draws, loss)
    assert added == pytest.approx(NBETA * (1 - (chains + 1) / (2 * chains)) * (draws - 1) / draws * loss, rel=1e-14)
    assert float(raw.mean()) == pytest.approx(float(standard.mean()) + added, rel=1e-12)
    assert float((raw - standard).std()) == pytest.approx(spread, rel=1e-12)


def test_the_named_option_of_the_estimator():
    """The same chains, estimated both ways; on one batch all of them begin at the same loss."""
    model = nn.Linear(3, 1)
    inputs = torch.randn(13, 3, generator=torch.Generator().manual_seed(0))

    def loss(predict, batch):
        return (predict(batch) - 5).square().mean()

    settings = {
        "num_chains": 5,
        "num_draws": 17,
        "epsilon": 1e-3,
        "gamma": 3.0,
        "nbeta": 7.0,
        "init_seed": 1,
        "test_target": False,
    }
    standard = estimate_llc(model, loss, [inputs], SamplerConfig.parse(settings))
    raw = estimate_llc(model, loss, [inputs], SamplerConfig.parse({**settings, "estimator": "published-language"}))
    assert torch.equal(standard.loss_trace, raw.loss_trace)
    added, spread = artefact(7.0, 5, 17, raw.init_loss)
    assert raw.llc_mean == pytest.approx(standard.llc_mean + added, rel=1e-6)
    assert float((raw.llc_per_chain - standard.llc_per_chain).std()) == pytest.approx(spread, rel=1e-6)
    assert raw.llc_corrected == pytest.approx(standard.llc_mean, rel=1e-6)
    assert raw.summary()["llc/corrected"] == raw.llc_corrected
    assert standard.llc_corrected == standard.llc_mean
    assert "llc/corrected" not in standard.summary()


@pytest.mark.parametrize("setting", ["num_burnin_steps", "num_init_loss_batches"])
def test_what_contradicts_it(setting):
    with pytest.raises(ValueError, match=f"which {setting} contradicts"):
        SamplerConfig.model_validate({"estimator": "published-language", "epsilon": 1e-3, setting: 3})


def test_it_is_the_default_nowhere_else():
    assert [name for name, preset in PRESETS.items() if preset.estimator != "standard"] == ["published-language"]
    assert SamplerConfig().estimator == "standard"


def test_the_published_table():
    """Its spread over chains is the artefact's: std / L = 6.42 ± 0.11, where the artefact alone makes 6.39."""
    table = pd.read_csv(PUBLISHED).dropna(subset=["llc_std_raw", "test_loss"])
    preset = PRESETS["published-language"]
    added, spread = artefact(preset.inverse_temperature, preset.num_chains, preset.num_draws, 1.0)
    assert added == pytest.approx(10.26, abs=0.005)
    ratio = table["llc_std_raw"] / table["test_loss"]
    assert abs(ratio.mean() - spread) < 0.1
    assert ratio.std() < 0.15
    assert len(ratio) == 500
