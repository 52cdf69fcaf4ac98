"""L(w*) on batches of its own: the noise that then does not cancel is in the standard error."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.evaluated import evaluated_of
from icl.sampling.init_losses import init_losses, unpaired_share
from icl.sampling.llc import with_samples
from icl.sampling.objective import ModuleObjective
from icl.sampling.supply import supply_of
from icl.subjects.regression import sampling_batches
from icl.tasks import RegressionTask


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


XS = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1))
SETTINGS = {
    "num_chains": 4, "num_draws": 60, "num_burnin_steps": 7, "epsilon": 1e-4, "gamma": 1.0, "nbeta": 100.0, "init_seed": 0,
    "test_target": False,
}  # fmt: skip


def at_minimum() -> tuple[torch.nn.Module, torch.Tensor]:
    model = torch.nn.Linear(5, 1, bias=False)
    ys = model(XS).detach() + NOISE
    model.weight.data = torch.linalg.lstsq(XS, ys).solution.T.clone()
    return model, ys


def loss(predict, batch):
    return (predict(batch[0]) - batch[1]).square().mean()


def fresh(ys, seed, step, chain=0):
    """A batch of 50 samples, drawn with replacement: endless data."""
    chosen = torch.randint(
        1000, (50,), generator=torch.Generator().manual_seed(seed * 10**8 + chain % 997 * 10**5 + step)
    )
    return XS[chosen], ys[chosen]


def cut(ys, seed, first=0):
    """Some of 100 batches of 10 samples, in a new order."""
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    return [(XS[part], ys[part]) for part in order.split(10)][first:]


CASES = {
    "endless": ({}, lambda ys, seed: (partial(fresh, ys, seed), None)),
    "a cycle": ({}, lambda ys, seed: (cut(ys, seed), None)),
    "own batches": ({"independent_batches": True}, lambda ys, seed: (partial(fresh, ys, seed), None)),
    "new batches": ({"eval_method": "new-minibatch"}, lambda ys, seed: (partial(fresh, ys, seed), None)),
    "new batches, held out": (
        {"eval_method": "new-minibatch"}, lambda ys, seed: (partial(fresh, ys, 0), partial(fresh, ys, seed + 1))),
    "one batch": ({"eval_method": "fixed-minibatch"}, lambda ys, seed: (partial(fresh, ys, 0), cut(ys, seed))),
    "the data set": ({"eval_method": "dataset"}, lambda ys, seed: (partial(fresh, ys, 0), cut(ys, seed))),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name == "the data set" else []) for name in CASES]
)
def test_estimates_scatter_as_their_standard_errors_say(case):
    settings, data = CASES[case]
    model, ys = at_minimum()
    scores = []
    for seed in range(12):
        batches, held_out = data(ys, seed)
        config = SamplerConfig(**SETTINGS, **settings)
        paired, separate = (
            estimate_llc(
                model, loss, batches, config.model_copy(update={"num_init_loss_batches": count}), eval_batches=held_out
            )
            for count in (None, 20)
        )
        assert separate.llc_mcse == pytest.approx(math.hypot(paired.llc_mcse, separate.init_error), rel=0.5)
        assert "leave num_init_loss_batches out" in separate.verdict.text
        scores.append((separate.llc_mean - paired.llc_mean) / separate.init_error)
    # The mean of 12 squares of standard normal numbers lies between 0.37 and 1.94 with probability 95 %.
    assert 0.3 < np.mean(np.square(scores)) < 2.2


def test_the_spread_of_a_finite_data_set_is_that_of_its_batches():
    model, ys = at_minimum()
    batches = [(XS[:500], ys[:500]), (XS[500:], ys[500:])]
    objective = ModuleObjective(model, loss)
    found = init_losses(objective, objective.anchor[None], lambda i: batches[i % 2], 3, 2, weight=lambda batch: 1)
    losses = torch.stack([loss(model, batch).detach() for batch in batches])
    torch.testing.assert_close(found.spread, losses.std(dim=0)[None].double(), rtol=1e-4, atol=0)


def test_chains_are_not_precise_before_l_of_w_star_is():
    model, ys = at_minimum()
    told: list[float] = []
    config = SamplerConfig(**{**SETTINGS, "target_error": 0.05, "max_draws": 200}, num_init_loss_batches=2)
    result = estimate_llc(model, loss, partial(fresh, ys, 0), config, so_far=lambda mean, error: told.append(error))
    assert told[-1] == pytest.approx(result.llc_mcse)
    assert min(told) > 1
    assert result.loss_trace.shape[1] == 200


def test_an_evaluation_set_says_how_many_samples_it_has():
    task, sampler = RegressionTask(2, 3, 0.25), SamplerConfig(grad_batch_origin="eval-dataset", nbeta=10.0)
    supply = supply_of(sampling_batches(task, sampler, 0)[0], False, 0)
    assert (supply.num_samples, supply.per_pass) == (
        sampler.eval_dataset_size,
        sampler.eval_dataset_size // sampler.grad_batch_size,
    )
    assert with_samples(sampler, supply).model_fields_set >= {"eval_dataset_size"}


def test_without_batches_of_its_own_there_is_no_such_error():
    model = torch.nn.Linear(3, 1)
    config = SamplerConfig(num_chains=2, num_draws=5, epsilon=1e-4, nbeta=10.0, init_seed=0)
    result = estimate_llc(model, lambda predict, xs: predict(xs).square().mean(), [torch.randn(20, 3)], config)
    assert result.init_error == 0


def test_of_unequal_batches_the_larger_counts_for_more():
    model, ys = at_minimum()
    batches = [(XS[:900], ys[:900]), (XS[900:], ys[900:] + 10.0)]
    whole = float(loss(model, (XS, torch.cat([batch[1] for batch in batches]))).detach())
    settings = {**SETTINGS, "num_draws": 400, "epsilon": 1e-6}
    for method in ("dataset", "new-minibatch"):
        config = SamplerConfig(**settings, eval_method=method)
        plain = estimate_llc(model, loss, batches, config, eval_batches=batches)
        assert plain.init_loss == pytest.approx(whole, rel=1e-4 if method == "dataset" else 0.45)
    result = estimate_llc(
        model,
        loss,
        batches,
        SamplerConfig(**settings, eval_method="dataset", num_init_loss_batches=2),
        eval_batches=batches,
    )
    assert result.init_loss == pytest.approx(whole, rel=1e-4)


def test_evaluation_data_that_nothing_is_evaluated_on_are_refused():
    model, ys = at_minimum()
    with pytest.raises(ValueError, match="eval_batches would not be used"):
        estimate_llc(model, loss, [(XS, ys)], SamplerConfig(**SETTINGS), eval_batches=[(XS, ys)])


def test_whole_passes_over_unequal_batches_leave_no_error():
    model, ys = at_minimum()
    batches = [(XS[part], ys[part]) for part in (slice(0, 400), slice(400, 800), slice(800, 900), slice(900, 1000))]
    for count, exact in ((8, True), (3, False)):
        config = SamplerConfig(**SETTINGS, eval_method="dataset", num_init_loss_batches=count)
        result = estimate_llc(model, loss, batches, config, eval_batches=batches)
        assert (result.init_error < 1e-9) == exact


def test_new_batches_are_not_those_of_the_gradient():
    supply = supply_of([(XS[:600],), (XS[600:],)], False, 0)
    config = SamplerConfig(**SETTINGS, eval_method="new-minibatch")
    evaluated = evaluated_of(config, supply, [(XS[:600],), (XS[600:],)], 0, torch.device("cpu"))
    sizes = [[len(source(step)[0]) for step in range(200)] for source in (supply.source, evaluated.batch)]
    assert sizes[0] != sizes[1]
    for each in sizes:
        assert each.count(600) / 200 == pytest.approx(0.6, abs=0.12)
