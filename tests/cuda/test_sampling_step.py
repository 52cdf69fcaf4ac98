"""Chains on one device: their estimates, their noise, and the memory that they take."""

import pytest
import torch

from icl.evals import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import Inputs, LLCResult, SamplerConfig, estimate_llc, estimate_llcs
from icl.sampling.chains import chains_that_fit
from icl.sampling.noise import noise_blocks
from icl.sampling.transformer_objective import make_objective
from icl.streams import Stream
from icl.tasks import RegressionTask

CPU = torch.device("cpu")
CONFIG = SamplerConfig(num_chains=3, num_draws=40, epsilon=1e-4, gamma=30.0, nbeta=20.0, init_seed=3)


def model_on(device: torch.device, seed: int = 1) -> InContextRegressionTransformer:
    return InContextRegressionTransformer(3, 5, embed_size=14, mlp_size=11, num_heads=2, num_layers=2, seed=seed).to(
        device
    )


def inputs_on(device: torch.device) -> Inputs:
    law = RegressionTask(3, 5, noise_variance=0.25)
    return Inputs(lambda step: law.sample(Stream(5, "sampling"), step, 31, device))


def estimate_on(device: torch.device, config: SamplerConfig = CONFIG) -> LLCResult:
    return estimate_llc(model_on(device), mse_loss, inputs_on(device).batches, config)


def test_noise_is_that_of_the_cpu_bit_for_bit(device):
    here, there = (noise_blocks([5, 2**20 + 7], 3, torch.empty(2, 1009, device=where)) for where in (device, CPU))
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(
            ours.cpu(), theirs, rtol=0, atol=1e-6
        )  # the normal law's own functions may round otherwise


def test_the_estimate_is_that_of_the_cpu(device):
    here, there = estimate_on(device), estimate_on(CPU)
    assert abs(here.llc_mean - there.llc_mean) <= 0.01 * abs(there.llc_mean) + 0.1 * there.llc_mcse
    torch.testing.assert_close(here.loss_trace[:, 0], there.loss_trace[:, 0], rtol=1e-4, atol=1e-5)


def test_two_estimates_are_the_same_bytes(device):
    assert torch.equal(estimate_on(device).loss_trace, estimate_on(device).loss_trace)


def test_chains_of_several_checkpoints_in_a_batch_are_those_of_each_alone(device):
    models = [model_on(device, seed) for seed in (1, 2)]
    together = list(estimate_llcs(models, mse_loss, inputs_on(device), CONFIG))
    for model, ours in zip(models, together, strict=True):
        alone = estimate_llc(model, mse_loss, inputs_on(device).batches, CONFIG)
        torch.testing.assert_close(ours.loss_trace, alone.loss_trace, rtol=1e-3, atol=1e-4)


def test_what_is_not_sampled_stays_at_w_star(device):
    config = CONFIG.model_copy(update={"include": ("blocks.0.**",)})
    part, whole = estimate_on(device, config), estimate_on(device)
    assert part.num_lost == 0
    assert part.llc_mean != whole.llc_mean
    everything = CONFIG.model_copy(
        update={"include": ("blocks.**", "token*.**", "position*.**", "final*.**", "un*.**")}
    )
    torch.testing.assert_close(estimate_on(device, everything).loss_trace, whole.loss_trace, rtol=1e-3, atol=1e-4)


def test_a_chain_that_is_lost_does_not_touch_the_others(device):
    wild = CONFIG.model_copy(update={"epsilon": 3.0, "gamma": 0.0})
    lost = estimate_on(device, wild)
    assert lost.num_lost == 3  # every chain; the program goes on
    assert estimate_on(device).num_lost == 0


def test_chains_stay_within_the_memory_that_they_were_given(device):
    if device.type != "cuda":
        pytest.skip("only a GPU counts the memory of its tensors")
    bound = 2**28
    config = CONFIG.model_copy(update={"num_chains": 4096, "num_draws": 3, "max_memory_bytes": bound})
    objective = make_objective(model_on(device), mse_loss, config)
    assert chains_that_fit(config, objective, inputs_on(device).batches(0)) < 4096
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    estimate_on(device, config)
    assert torch.cuda.max_memory_allocated(device) - before <= bound


def test_precision_is_that_of_the_setting(device):
    exact, split, rounded = (
        estimate_on(device, CONFIG.model_copy(update={"matmul_precision": each, "num_draws": 10, "test_target": False}))
        for each in ("highest", "tf32x3", "tf32")
    )
    torch.testing.assert_close(split.loss_trace, exact.loss_trace, rtol=1e-3, atol=1e-4)
    assert not torch.equal(rounded.loss_trace, exact.loss_trace)
    assert abs(rounded.llc_mean - exact.llc_mean) <= 0.5 * exact.llc_mcse


def test_observables_are_those_of_the_cpu(device):
    pytest.importorskip("xarray", reason="observables are labelled arrays")
    config = CONFIG.model_copy(update={"num_draws": 10, "test_target": False})

    def squares(predict, batch):
        xs, ys = batch
        return (predict(xs, ys) - ys).square().mean(dim=(1, 2))

    def observed(where: torch.device) -> torch.Tensor:
        inputs = inputs_on(where)
        found = estimate_llc(
            model_on(where), mse_loss, inputs.batches, config, observables={"probe": ([inputs.batches(0)], squares)}
        )
        return torch.from_numpy(found.observables["probe"].values)

    here, there = observed(device), observed(CPU)
    assert here.shape[:2] == (config.num_chains, config.num_draws)
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)
