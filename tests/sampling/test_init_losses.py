"""L(w*) on batches of its own: the noise that then does not cancel is in the standard error."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.init_losses import unpaired_share


def losses_of_batches(rng, last: int, per_pass: int | None, renewed: bool) -> np.ndarray:
    """ℓ(w*; b) of the batches up to the last one, with standard deviation 1 between batches."""
    if per_pass is None:
        return rng.standard_normal(last + 1)
    passes = -(-(last + 1) // per_pass)
    data = rng.standard_normal(per_pass)
    data = (data - data.mean()) / data.std(ddof=1)
    return np.concatenate([rng.permutation(data) if renewed else data for _ in range(passes)])


@pytest.mark.parametrize(("drawn", "count", "per_pass", "renewed"), [
    (range(40), 10, None, False), (range(5, 45), 10, None, False), (range(3, 63, 3), 12, None, False), (range(1), 10, None, False),
    (range(40), 10, 8, False), (range(5, 45, 5), 8, 8, False), (range(40), 10, 8, True), (range(2, 37), 13, 8, True),
    (range(40), 0, 16, True), ((), 10, 16, True),
])  # fmt: skip
def test_the_share_is_the_standard_deviation_of_the_difference_of_the_means(drawn, count, per_pass, renewed):
    rng, differences = np.random.default_rng(0), []
    for _ in range(4000):
        losses = losses_of_batches(rng, max([count, *drawn]), per_pass, renewed)
        means = [losses[list(places)].mean() if len(places) else 0.0 for places in (drawn, range(count))]
        differences.append(means[0] - means[1])
    assert unpaired_share(drawn, count, per_pass, renewed) == pytest.approx(np.std(differences), rel=0.05, abs=1e-9)


def test_whole_passes_leave_no_error():
    assert unpaired_share(range(5, 45), 8, 8, False) == pytest.approx(0, abs=1e-12)
    assert unpaired_share(range(40), 16, 8, True) == pytest.approx(0, abs=1e-12)


def test_in_the_published_setting_the_error_is_a_thousandth_of_that_of_a_batch():
    # 1,024 batches are the whole evaluation set, and 5,000 draws are nearly five passes over it.
    assert unpaired_share(range(5000), 1024, 1024, True) < 0.003 < 0.02 < unpaired_share(range(5000), 1024, None, True)


def test_estimates_scatter_as_their_standard_errors_say():
    generator = torch.Generator().manual_seed(0)
    xs, noise = torch.randn(1000, 5, generator=generator), torch.randn(1000, 1, generator=generator)
    model = torch.nn.Linear(5, 1, bias=False)
    ys = model(xs).detach() + noise
    model.weight.data = torch.linalg.lstsq(xs, ys).solution.T.clone()

    def loss(predict, batch):
        return (predict(batch[0]) - batch[1]).square().mean()

    def fresh(seed, step):
        chosen = torch.randint(1000, (50,), generator=torch.Generator().manual_seed(seed * 10**6 + step))
        return xs[chosen], ys[chosen]

    settings = {
        "num_chains": 4,
        "num_draws": 150,
        "epsilon": 1e-4,
        "gamma": 1.0,
        "nbeta": 100.0,
        "init_seed": 0,
        "test_target": False,
    }
    scores = []
    for seed in range(24):
        paired, separate = (
            estimate_llc(model, loss, partial(fresh, seed), SamplerConfig(**settings, num_init_loss_batches=count))
            for count in (None, 20)
        )
        assert separate.llc_mcse > 5 * paired.llc_mcse
        assert "leave num_init_loss_batches out" in separate.verdict.text
        scores.append((separate.llc_mean - paired.llc_mean) / separate.init_error)
    assert math.sqrt(np.mean(np.square(scores))) == pytest.approx(1, abs=0.3)


def test_without_batches_of_its_own_there_is_no_such_error():
    model = torch.nn.Linear(3, 1)
    config = SamplerConfig(num_chains=2, num_draws=5, epsilon=1e-4, nbeta=10.0, init_seed=0)
    result = estimate_llc(model, lambda predict, xs: predict(xs).square().mean(), [torch.randn(20, 3)], config)
    assert result.init_error == 0
