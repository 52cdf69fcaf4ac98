"""Susceptibilities: closed form, devinterp's, and what is left out and said."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from icl.sampling import SamplerConfig, estimate_llc, susceptibility
from icl.streams import Stream

D, S = 5, 7
INPUTS = Stream(0, "test/response/x").normal(0, (89, D))
PROBE, ERRORS = Stream(1, "test/response/x").normal(0, (S, D)), Stream(2, "test/response/e").normal(0, (S,))
CONFIG = SamplerConfig(num_chains=16, num_draws=700, num_burnin_steps=200, gamma=2.0, nbeta=30.0, init_seed=0)
PART = [0, 3]


def linear() -> nn.Module:
    model = nn.Linear(D, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def squares(predict, batch):
    return predict(batch).square().mean()


def observed(seed, mask=None):
    observables = {
        "probe": ([(PROBE, ERRORS)], lambda predict, batch: (predict(batch[0])[:, 0] - batch[1]).square()),
        "pretraining": ([INPUTS], lambda predict, batch: predict(batch)[:, 0].square()),
    }
    config = CONFIG.model_copy(update={"init_seed": seed})
    return estimate_llc(linear(), squares, [INPUTS], config, observables=observables, mask=mask).observables


@pytest.fixture(scope="module")
def whole():
    return observed(0)


@pytest.fixture(scope="module")
def part():
    return observed(1, {"weight": torch.tensor([place in PART for place in range(D)])})


def covariance_of(quadratics, sigma):
    """E[q] and E[q q'] of quadratics wᵀAw − 2 b·w + c of w ~ N(0, Σ)."""
    means = [float(torch.trace(a @ sigma)) + c for a, _, c in quadratics]
    (a, b, _), (other, slope, _) = quadratics
    product = 2 * float(torch.trace(a @ sigma @ other @ sigma)) + 4 * float(b @ sigma @ slope)
    return means, product + means[0] * means[1]


def closed_form(coordinates):
    """χ of each sample for the part that moves in some coordinates: E_C[φ ΔL] and E_C[φ] with those alone, E[ΔL] with all."""
    moment = (INPUTS.T @ INPUTS / len(INPUTS)).double()
    zero = torch.zeros(D).double()

    def gaussian(chosen):
        sigma = torch.zeros(D, D).double()
        grid = torch.meshgrid(torch.tensor(chosen), torch.tensor(chosen), indexing="ij")
        sigma[grid] = torch.linalg.inv(CONFIG.nbeta * 2 * moment[grid] + CONFIG.gamma * torch.eye(len(chosen)).double())
        return sigma

    own, full = gaussian(coordinates), gaussian(list(range(D)))
    found = []
    for x, error in zip(PROBE.double(), ERRORS.double(), strict=True):
        shift = (torch.outer(x, x) - moment, error * x, float(error.square()))
        (phi, _), joint = covariance_of(((moment, zero, 0.0), shift), own)
        found.append(-(joint - phi * (float(torch.trace(shift[0] @ full)) + shift[2])))
    return np.array(found)


def test_the_whole_models_susceptibility_is_the_gaussians(whole):
    found = susceptibility(whole["probe"], whole["pretraining"])
    exact = closed_form(list(range(D)))
    off = (found["susceptibility"] - exact) / found["mcse"]
    assert float(np.abs(off).max()) < 3.5
    assert float(found["mcse"].max()) < 0.4 * np.abs(exact).max(), "known well enough that this is a test"
    assert abs(float(found["total"]) - exact.mean()) < 3 * float(found["total_mcse"])
    assert found.attrs["verdict"] == "healthy"


def test_a_parts_susceptibility_is_the_gaussians(whole, part):
    found = susceptibility(part["probe"], part["pretraining"], full=(whole["probe"], whole["pretraining"]))
    exact = closed_form(PART)
    off = (found["susceptibility"] - exact) / found["mcse"]
    assert float(np.abs(off).max()) < 3.5
    assert float(found["mcse"].max()) < 0.4 * np.abs(exact).max(), "known well enough that this is a test"
    assert abs(float(found["total"]) - exact.mean()) < 3 * float(found["total_mcse"])


def test_every_estimate_that_enters_has_its_verdict_in_the_answer(whole, part):
    left = {name: values.assign_attrs(verdict="left the basin") for name, values in whole.items()}
    found = susceptibility(part["probe"], part["pretraining"], full=(left["probe"], left["pretraining"]))
    assert "of the whole model's chains: left the basin" in found.attrs["verdict"]
    assert "of the chains: left the basin" in susceptibility(whole["probe"], left["pretraining"]).attrs["verdict"]


def test_two_draws_are_too_few_to_call_it_healthy(whole):
    found = susceptibility(whole["probe"][:, :2], whole["pretraining"][:, :2])
    assert "too few draws to compare chains" in found.attrs["verdict"]


def test_susceptibilities_are_those_of_devinterp_on_the_same_draws(whole, part):
    theirs = pytest.importorskip("devinterp.slt.susceptibilities")

    def tree(losses, draws):
        tokens = {name: values[:, :draws].expand_dims("token", -1) for name, values in losses.items()}
        variables = {
            f"loss_{name}": (("chain", "draw", f"batch_{name}", "token_pos"), values.values)
            for name, values in tokens.items()
        }
        ids = {
            f"input_ids_{name}": ((f"batch_{name}", "token"), np.zeros((v.sizes["sample"], 2), dtype=int))
            for name, v in tokens.items()
        }
        init = {"init_loss": ((), float(losses["pretraining"]["at_w_star"].mean()))}
        return xr.DataTree(xr.Dataset({**variables, **ids, **init}))

    # A restricted run may have other draws than the whole one.
    answer = theirs.compute_susceptibilities({"full": tree(whole, 700), "part": tree(part, 300)}, "pretraining")
    exact = answer["susceptibilities"]["sus"].values[:, 0]
    ours = susceptibility(
        part["probe"][:, :300], part["pretraining"][:, :300], full=(whole["probe"], whole["pretraining"])
    )
    np.testing.assert_allclose(ours["susceptibility"], exact, rtol=2e-3, atol=2e-5 * float(np.abs(exact).max()))


def test_tokens_contribute_each_and_blocks_agree(whole, monkeypatch):
    probe = whole["probe"]
    tokens = xr.concat([probe, 2 * probe], "token").transpose("chain", "draw", "sample", "token")
    found = susceptibility(tokens, whole["pretraining"])
    assert found["susceptibility"].dims == ("sample", "token")
    plain = susceptibility(probe, whole["pretraining"])
    np.testing.assert_allclose(found["susceptibility"][:, 0], plain["susceptibility"], rtol=1e-6)
    monkeypatch.setattr("icl.sampling.series.BLOCK", 3)
    for name, values in susceptibility(probe, whole["pretraining"]).items():
        np.testing.assert_allclose(values, plain[name], rtol=1e-9, err_msg=str(name))


def test_what_does_not_fit_is_said(whole, part):
    probe, pretraining = whole["probe"], whole["pretraining"]
    with pytest.raises(ValueError, match="same draws"):
        susceptibility(probe[:, :100], pretraining)
    with pytest.raises(ValueError, match="init_loss"):
        susceptibility(probe, pretraining.drop_vars("at_w_star"))
    with pytest.raises(ValueError, match="observe the same data"):
        susceptibility(probe, pretraining, full=(part["probe"][:, :, :3], part["pretraining"]))
    lost = probe.copy()
    lost[1, 5:, 2] = np.nan
    assert "1 of 16 chains diverged" in susceptibility(lost, pretraining).attrs["verdict"]
