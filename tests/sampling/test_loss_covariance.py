"""Losses of samples at the draws, and how they depend on each other."""

import errno
import gc
import os

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from icl.model import InContextRegressionTransformer
from icl.sampling import SamplerConfig, estimate_llc, influence, loss_kernel
from icl.streams import Stream

D, S, T = 5, 7, 3
INPUTS = Stream(0, "test/influence/x").normal(0, (89, D))
PROBE, ERRORS = Stream(1, "test/influence/x").normal(0, (S, D)), Stream(2, "test/influence/e").normal(0, (S,))
CONFIG = SamplerConfig(num_chains=16, num_draws=700, num_burnin_steps=200, gamma=2.0, nbeta=30.0, init_seed=0)
SHORT = SamplerConfig(num_chains=3, num_draws=20, epsilon=1e-3, gamma=1.0, nbeta=10.0, init_seed=7)


def linear() -> nn.Module:
    model = nn.Linear(D, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def squares(predict, batch):
    return predict(batch).square().mean()


def probe_losses(predict, batch):
    """ℓ_i = (x_i·(w − w*) − e_i)², at w* = 0."""
    xs, errors = batch
    return (predict(xs)[:, 0] - errors).square()


def token_losses(predict, batch):
    xs, errors = batch
    shifts = torch.arange(T) / T
    return (predict(xs) - errors[:, None] - shifts).square()


@pytest.fixture(scope="module")
def observed():
    probes = [(PROBE[:4], ERRORS[:4]), (PROBE[4:], ERRORS[4:])]
    return estimate_llc(
        linear(),
        squares,
        [INPUTS],
        CONFIG,
        observables={"probe": (probes, probe_losses), "tokens": (probes, token_losses)},
    )


def closed_form() -> torch.Tensor:
    """Cov(ℓ_i, ℓ_j) = 2 (x_iᵀΣx_j)² + 4 e_i e_j x_iᵀΣx_j for w − w* ~ N(0, Σ), Σ = (nβH + γ)⁻¹."""
    hessian = 2 * INPUTS.T @ INPUTS / len(INPUTS)
    sigma = torch.linalg.inv(CONFIG.nbeta * hessian.double() + CONFIG.gamma * torch.eye(D))
    between = PROBE.double() @ sigma @ PROBE.double().T
    return 2 * between.square() + 4 * torch.outer(ERRORS, ERRORS) * between


def test_losses_of_every_sample_are_kept_at_every_draw(observed):
    losses, tokens = observed.observables["probe"], observed.observables["tokens"]
    assert losses.dims == ("chain", "draw", "sample")
    assert losses.shape == (16, 700, S)
    assert tokens.dims == ("chain", "draw", "sample", "token")
    assert tokens.shape == (16, 700, S, T)
    np.testing.assert_allclose(losses["at_w_star"], ERRORS.square(), rtol=1e-6)
    np.testing.assert_allclose(tokens[..., 0], losses, rtol=1e-5)
    # The chain's own loss, from the probe of all its data.
    again = estimate_llc(
        linear(),
        squares,
        [INPUTS],
        SHORT,
        observables={"all": ([INPUTS], lambda predict, xs: predict(xs)[:, 0].square())},
    )
    np.testing.assert_allclose(again.observables["all"].mean("sample"), again.loss_trace, rtol=1e-5)
    assert torch.equal(again.loss_trace, estimate_llc(linear(), squares, [INPUTS], SHORT).loss_trace)


def test_covariances_are_those_of_the_gaussian(observed):
    found = influence(observed.observables["probe"])
    assert observed.ess > 1000
    assert found["covariance"].dims == ("sample", "sample_2")
    exact = closed_form().numpy()
    off = (found["covariance"] - exact) / found["mcse"]
    # Errors hold Student's factor, so that two of them are 95 %; entries share their draws.
    assert float((np.abs(off) < 2).mean()) > 0.8
    assert float(np.abs(off).max()) < 4
    assert float((found["mcse"].values.diagonal() / exact.diagonal()).max()) < 0.15, "and they are known well"
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    off = (found["correlation"] - exact / scale) / found["correlation_mcse"].where(found["correlation_mcse"] > 1e-12)
    assert float(np.abs(off).max()) < 5
    assert found.attrs["verdict"] == "healthy"
    assert found.attrs["resolved"] > 0.5


def test_standard_errors_hold_over_repetitions():
    # Independent Gaussian series that remember: the spread of covariances over repetitions against their errors.
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).double()
    ratios = []
    for chains in (5, 1):
        found = []
        for _ in range(60):
            steps = torch.randn(chains, 500, 2, generator=generator, dtype=torch.float64) @ mixing.T
            for draw in range(1, 500):
                steps[:, draw] = 0.8 * steps[:, draw - 1] + 0.6 * steps[:, draw]
            found.append(influence(xr.DataArray(steps.numpy(), dims=("chain", "draw", "sample"))))
        for value, error in (("covariance", "mcse"), ("correlation", "correlation_mcse")):
            each = np.array([[float(one[name][0, 1]) for name in (value, error)] for one in found])
            ratios.append(np.abs((each[:, 0] - 0.6) / each[:, 1]) < 2)
    assert all(share.mean() > 0.85 for share in ratios), [share.mean() for share in ratios]


def test_one_chain_tokens_queries_and_blocks_agree(observed, monkeypatch):
    losses, tokens = observed.observables["probe"][:4, :200], observed.observables["tokens"][:4, :200]
    whole = influence(losses)
    queries = influence(losses[:, :, :2], losses[:, :, 2:])
    np.testing.assert_allclose(queries["covariance"], whole["covariance"][:2, 2:], rtol=1e-10)
    np.testing.assert_allclose(queries["correlation_mcse"], whole["correlation_mcse"][:2, 2:], rtol=1e-8)
    by_token = influence(tokens, per_token=True)
    assert by_token["covariance"].dims == ("sample", "token", "sample_2", "token_2")
    np.testing.assert_allclose(
        by_token["covariance"].mean(["token", "token_2"]), influence(tokens)["covariance"], rtol=1e-5, atol=1e-9
    )
    alone = influence(losses[:1])
    np.testing.assert_allclose(alone["covariance"], np.cov(losses[0].astype(float).T), rtol=1e-8)
    assert bool((alone["mcse"] > 0).all())
    monkeypatch.setattr("icl.sampling.series.BLOCK", 3)
    for name, values in influence(losses).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-10, atol=1e-12, err_msg=str(name))


def test_a_lost_chain_is_left_out_and_said(observed):
    losses = observed.observables["probe"][:4, :300].copy()
    losses[2, 250:, 1] = np.nan
    found = influence(losses)
    assert "1 of 4 chains diverged" in found.attrs["verdict"]
    np.testing.assert_allclose(found["covariance"], influence(losses[[0, 1, 3]])["covariance"], rtol=1e-10)
    losses[:, 0, 0] = np.inf
    with pytest.raises(ValueError, match="every chain"):
        influence(losses)


def test_the_loss_kernel_has_features_whose_products_give_it_back(observed):
    kernel = loss_kernel(observed.observables["probe"], components=S)
    back = kernel["feature"].values @ kernel["feature"].values.T
    np.testing.assert_allclose(back, kernel["correlation"], atol=1e-8)
    np.testing.assert_allclose(np.diag(kernel["correlation"]), 1.0)
    assert bool((kernel["eigenvalue"].diff("component") <= 1e-9).all())
    still = observed.observables["probe"].copy()
    still[:, :, 0] = 1.0
    assert bool((loss_kernel(still)["feature"][0] == 0).all())


def test_losses_beyond_the_memory_go_to_a_file_and_are_the_same():
    def run(**more):
        return estimate_llc(
            linear(),
            squares,
            [INPUTS],
            SHORT.model_copy(update=more),
            observables={"probe": ([(PROBE, ERRORS)], token_losses)},
        )

    needed = 4 * 3 * 20 * S * T
    held, filed = run(max_memory_bytes=needed), run(max_memory_bytes=needed - 1)
    assert not held.observed["probe"].in_file
    assert filed.observed["probe"].in_file
    losses = filed.observables["probe"]
    xr.testing.assert_allclose(held.observables["probe"], losses)
    del filed, held
    gc.collect()
    assert np.isfinite(losses).all(), "an array outlives its estimate"
    np.testing.assert_allclose(
        influence(losses)["covariance"], influence(losses.copy(data=np.array(losses)))["covariance"]
    )


def test_a_full_disk_says_which_observable_and_what_to_do(monkeypatch):
    config = SHORT.model_copy(update={"max_memory_bytes": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"probe.*TMPDIR"):
        estimate_llc(linear(), squares, [INPUTS], config, observables={"probe": ([(PROBE, ERRORS)], probe_losses)})


def test_observables_of_the_librarys_transformer_under_any_restriction():
    model = InContextRegressionTransformer(
        task_size=2, max_examples=3, embed_size=8, mlp_size=8, num_heads=2, num_layers=1
    )
    from icl.evals import mse_loss

    batch = Stream(0, "test/xs").normal(0, (11, 3, 2)), Stream(0, "test/ys").normal(0, (11, 3, 1))

    def per_token(predict, batch):
        return (predict(*batch) - batch[1]).square()[..., 0]

    for include in (("**",), ("blocks.*.attention.**",), ("token_sequence_transformer.unembedding.**",)):
        config = SHORT.model_copy(update={"include": include, "num_draws": 4})
        result = estimate_llc(model, mse_loss, [batch], config, observables={"all": ([batch], per_token)})
        np.testing.assert_allclose(result.observables["all"].mean("sample"), result.token_loss_trace, rtol=1e-4)


@pytest.mark.parametrize(
    ("batches", "loss", "words"),
    [
        ([], probe_losses, "no batches"),
        (PROBE, probe_losses, r"list of batches, such as \[batch\]"),
        ([(PROBE, ERRORS)], lambda predict, batch: probe_losses(predict, batch).mean(), "reduction='none'"),
        ([(PROBE, ERRORS)], lambda predict, batch: probe_losses(predict, batch)[:3], r"\(7,\) or \(7, tokens\)"),
        ([(PROBE, ERRORS)], lambda predict, batch: probe_losses(predict, batch) / (batch[1] != batch[1][2]), "sample 2 is not finite"),
        ([(PROBE, ERRORS), (PROBE, ERRORS)[:1] * 2], lambda predict, batch: predict(batch[0]).expand(-1, 1 + batch[1].ndim), "one length"),
    ],
)  # fmt: skip
def test_wrong_observables_are_one_line_that_says_what_to_do(batches, loss, words):
    with pytest.raises(ValueError, match=words) as error:
        estimate_llc(linear(), squares, [INPUTS], SHORT, observables={"probe": (batches, loss)})
    assert "probe" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_draws_leave_as_xarray_and_for_arviz(observed):
    whole = observed.to_xarray()
    assert float(whole["llc"].mean()) == pytest.approx(observed.llc_mean)
    assert whole["probe"].dims == ("chain", "draw", "probe_sample")
    np.testing.assert_array_equal(whole["probe_at_w_star"], observed.observables["probe"]["at_w_star"])
    assert whole.attrs["verdict"] == observed.verdict.text
    arviz = pytest.importorskip("arviz")
    data = observed.to_arviz()
    summary = arviz.summary(data, var_names=["llc", "probe"], kind="diagnostics")
    assert float(summary.loc["llc", "ess_bulk"]) == pytest.approx(observed.llc_ess, rel=0.05)
    assert bool((data["sample_stats"]["diverging"] == 0).all())


@pytest.mark.parametrize("method", ["sequence", "token"])
@pytest.mark.parametrize("covariance", [True, False])
def test_influence_is_that_of_devinterp_on_the_same_draws(observed, method, covariance):
    bif = pytest.importorskip("devinterp.slt.bif")
    tokens = observed.observables["tokens"][:3, :101]
    given = xr.Dataset({
        "loss_tokens": (("chain", "draw", "batch_tokens", "token_pos"), tokens.values),
        "input_ids_tokens": (("batch_tokens", "token"), np.zeros((S, T + 1), dtype=int)),
    })  # fmt: skip
    theirs = bif.compute_bif(
        xr.DataTree(given), correlation_method=method, compute_covariance=covariance, device="cpu"
    )["influences"]
    ours = influence(tokens, per_token=method == "token")["covariance" if covariance else "correlation"]
    if method == "token":
        ours = ours.transpose("sample", "sample_2", "token", "token_2")
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5 * float(np.abs(theirs).max()))
