"""A test that could not be made is named in the verdict; it does not count as passed."""

import math

import pytest
import torch

from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.stein import Ratio
from icl.sampling.verdict import Evidence, judge

ONE, NOTHING = Ratio(1.0, 0.01), Ratio(0.0, 0.01)
SOUND = {
    "num_lost": 0,
    "rhat": 1.0,
    "ess": 500.0,
    "mcse": 0.001,
    "mean_loss": 1.5,
    "init_loss": 1.0,
    "reference_loss": 4.0,
}
EVIDENCE = Evidence(stiff=ONE, virial=ONE, temperature=ONE, cost=NOTHING, twin=NOTHING, sensitivity=NOTHING)
XS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))


def judged(draws: int = 40, **changed):
    return judge(torch.full((3, draws), 0.5).double(), **{**SOUND, **changed}, evidence=EVIDENCE)


def squares(predict, batch):
    return (predict(batch) - 1).square().mean()


def test_what_passes_every_test_is_healthy():
    assert judged().text == "healthy"


@pytest.mark.parametrize(("changed", "name"), [
    ({"noise_heating": math.nan}, "batch noise"), ({"rhat": math.nan}, "agreement"), ({"ess": math.nan}, "agreement"),
    ({"draws": 20}, "rise"), ({"mcse": math.nan}, "error"), ({"reference_loss": None}, "basin"),
])  # fmt: skip
def test_what_was_not_tested_is_not_healthy(changed, name):
    verdict = judged(**changed)
    assert not verdict.trusted
    assert verdict.sound
    assert f"not tested: {name} (" in verdict.text


@pytest.mark.parametrize("method", ["rmsprop_sgld", "sgnht"])
def test_batches_may_heat_a_kernel_that_has_no_formula_for_it(method):
    settings = {
        "sampling_method": method,
        "num_chains": 4,
        "num_draws": 40,
        "epsilon": 1e-4,
        "nbeta": 10.0,
        "init_seed": 0,
    }
    model = torch.nn.Linear(3, 1)
    several = estimate_llc(model, squares, [XS[:20], XS[20:40], XS[40:]], SamplerConfig(**settings))
    whole = estimate_llc(model, squares, [XS], SamplerConfig(**settings))
    assert math.isnan(several.noise_heating)
    assert "batch noise (no formula" in several.verdict.text
    assert whole.noise_heating == 0
    assert "batch noise" not in whole.verdict.text


def test_the_order_of_the_batches_does_not_move_the_basin():
    xs = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    targets = 0.3 * xs.sum(dim=1, keepdim=True) + torch.randn(400, 1, generator=torch.Generator().manual_seed(2))
    model = torch.nn.Linear(6, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(xs, targets).solution.T.clone()

    def loss(predict, batch):
        return (predict(batch[0]) - batch[1]).square().mean()

    batches = [(xs[i : i + 20], targets[i : i + 20]) for i in range(0, 400, 20)]
    config = SamplerConfig(num_chains=2, num_draws=20, epsilon=1e-5, nbeta=10.0, init_seed=0)
    found = [estimate_llc(model, loss, batches[k:] + batches[:k], config).reference_loss for k in range(4)]
    assert found == pytest.approx([float(targets.square().mean())] * 4, rel=1e-4)


def test_n_is_that_of_the_data_whatever_nbeta_is_and_unknown_for_endless_data():
    config = SamplerConfig(num_chains=2, num_draws=5, epsilon=1e-4, nbeta=10.0, init_seed=0)
    known, endless = (
        estimate_llc(torch.nn.Linear(3, 1), squares, batches, config) for batches in ([XS], lambda step: XS)
    )
    assert known.num_samples == 60
    assert known.summary()["wbic/mean"] == pytest.approx(60 * known.mean_loss)
    assert endless.num_samples is None
    assert math.isnan(endless.wbic)
    assert "wbic/mean" not in endless.summary()


@pytest.mark.parametrize("units", ["absolute", "relative"])
def test_kept_weights_are_relative_to_w_star_in_any_units(units):
    config = SamplerConfig(
        num_chains=2,
        num_draws=5,
        epsilon=1e-4,
        nbeta=10.0,
        init_seed=0,
        localization_units=units,
        eval_metrics=("weights",),
    )
    model, seen = torch.nn.Linear(3, 1), []
    result = estimate_llc(
        model, squares, [XS], config, recorders=[lambda draw, weights, chains: seen.append(weights.clone())]
    )
    anchor = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(result.weights.deltas, torch.stack(seen, dim=1) - anchor)


@pytest.mark.parametrize(("settings", "said"), [
    ({"gamma": 0.0}, "gamma=0 leaves pilot chains nothing"), ({"nbeta": 0.0}, "nbeta=0 leaves pilot chains nothing"),
    ({"gamma": 0.0, "epsilon": 1e-3, "sampling_method": "langevin"}, "no friction"),
])  # fmt: skip
def test_constants_that_leave_nothing_to_sample_by_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SamplerConfig(**settings)


def test_a_chain_without_a_loss_has_a_verdict():
    config = SamplerConfig(num_chains=4, num_draws=40, epsilon=1e-2, gamma=4.0, nbeta=0.0, init_seed=0)
    result = estimate_llc(torch.nn.Linear(3, 1), squares, [XS], config)
    assert result.llc_mean == 0
    assert not result.verdict.trusted
