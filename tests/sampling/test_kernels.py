"""Each kernel against devinterp under identical noise, its limits, and the Gaussian that it must recover."""

import warnings

import pytest
import torch

from icl.sampling import langevin, rmsprop_sgld, sgld, sgnht
from icl.sampling.kernels import KERNELS
from icl.streams import Stream

P, STEPS = 11, 23
GRADIENTS = Stream(0, "test/gradients")
NOISE = Stream(0, "test/noise")


def quadratic_gradient(position: torch.Tensor) -> torch.Tensor:
    """∇L of L = Σ a_i w_i²/2, with a_i from 1 to 3."""
    return torch.linspace(1, 3, P, dtype=position.dtype) * position


def run_devinterp(make, start: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The optimiser's path from `start` when its noise is the test's."""
    weights = torch.nn.Parameter(start.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimiser = make([weights])
    steps = iter(range(1, STEPS + 1))

    def scripted(mean, std, size, **ignored):
        return mean + std * NOISE.normal(next(steps), size).to(start.dtype)

    monkeypatch.setattr(torch, "normal", scripted)
    for _ in range(STEPS):
        weights.grad = quadratic_gradient(weights.detach())
        optimiser.step()
    return weights.detach()


def run_ours(kernel, config, start: torch.Tensor, epsilon: float, first_noise: torch.Tensor) -> torch.Tensor:
    state = kernel.init(config, start, torch.full_like(start[:1], epsilon), first_noise)
    for step in range(1, STEPS + 1):
        noise = NOISE.normal(step, (P,)).to(start.dtype)
        state = kernel.step(config, state, quadratic_gradient(state.position), noise)
    return state.position


START = Stream(0, "test/start").normal(0, (P,)).double()


def test_sgld_is_devinterps_under_the_same_noise(monkeypatch):
    from devinterp.optim import SGMCMC

    config = sgld.SGLDConfig(nbeta=7.0, gamma=3.0, weight_decay=0.5, noise_level=0.7, bounding_box=0.4)
    ours = run_ours(sgld, config, START, 0.02, torch.zeros(P))

    def make(parameters):
        return SGMCMC.sgld(
            parameters, lr=0.02, nbeta=7.0, localization=3.0, weight_decay=0.5, noise_level=0.7, bounding_box_size=0.4
        )

    torch.testing.assert_close(ours, run_devinterp(make, START, monkeypatch), rtol=0, atol=1e-14)


def test_rmsprop_sgld_is_devinterps_under_the_same_noise(monkeypatch):
    from devinterp.optim import SGMCMC

    config = rmsprop_sgld.RMSPropSGLDConfig(nbeta=7.0, gamma=3.0, decay=0.9, stability=0.2)
    ours = run_ours(rmsprop_sgld, config, START, 0.005, torch.zeros(P))

    def make(parameters):
        return SGMCMC.rmsprop_sgld(parameters, lr=0.005, nbeta=7.0, localization=3.0, alpha=0.9, eps=0.2)

    torch.testing.assert_close(ours, run_devinterp(make, START, monkeypatch), rtol=0, atol=1e-13)


def test_sgnht_is_devinterps_under_the_same_noise(monkeypatch):
    from devinterp.optim.sgnht import SGNHT

    momentum = Stream(0, "test/momentum").normal(0, (P,)).double()
    config = sgnht.SGNHTConfig(nbeta=7.0, diffusion=0.03)
    ours = run_ours(sgnht, config, START, 0.004, momentum)
    monkeypatch.setattr(torch, "randn_like", lambda like: momentum.clone())

    def make(parameters):
        return SGNHT(parameters, lr=0.004, nbeta=7.0, diffusion_factor=0.03)

    # devinterp keeps its thermostat in single precision.
    torch.testing.assert_close(ours, run_devinterp(make, START, monkeypatch), rtol=0, atol=1e-6)


def test_sgld_without_noise_is_gradient_descent():
    config = sgld.SGLDConfig(nbeta=5.0, noise_level=0.0)
    ours = run_ours(sgld, config, START, 0.01, torch.zeros(P))
    expected = START * (1 - 0.01 / 2 * 5.0 * torch.linspace(1, 3, P, dtype=START.dtype)) ** STEPS
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_no_force_and_no_noise_leave_a_resting_chain_where_it_is(name):
    kernel = KERNELS[name]
    config = kernel.constants(nbeta=5.0, gamma=2.0, noise_level=0.0)
    state = kernel.init(config, START, torch.full((1,), 0.01, dtype=START.dtype), torch.zeros(P, dtype=START.dtype))
    state = kernel.step(config, state, torch.zeros_like(START), torch.ones_like(START))
    assert torch.equal(state.position, START)


@pytest.mark.parametrize("name", KERNELS)
def test_chains_of_a_batch_move_as_they_would_alone(name):
    kernel = KERNELS[name]
    config = kernel.constants(nbeta=5.0, gamma=2.0)
    starts = Stream(1, "test/start").normal(0, (3, P))
    epsilon = torch.full((3, 1), 0.01)

    def move(start, size):
        state = kernel.init(config, start, size, NOISE.normal(0, (3, P))[: start.shape[0]])
        for step in range(1, 6):
            state = kernel.step(
                config, state, quadratic_gradient(state.position), NOISE.normal(step, (3, P))[: len(start)]
            )
        return state.position

    assert torch.equal(move(starts, epsilon)[:1], move(starts[:1], epsilon[:1]))


def stationary_variance(kernel, config, epsilon: float, curvature: float) -> float:
    """Variance of 4096 chains in L = curvature · w²/2 after they have forgotten their start."""
    chains = torch.zeros(4096, 1, dtype=torch.float64)
    noise = Stream(3, "test/stationary")
    state = kernel.init(
        config, chains, torch.full((1, 1), epsilon, dtype=torch.float64), noise.normal(0, (4096, 1)).double()
    )
    total = torch.zeros(())
    for step in range(1, 401):
        state = kernel.step(config, state, curvature * state.position, noise.normal(step, (4096, 1)).double())
        if step > 200:
            total = total + state.position.square().mean() / 200
    return float(total)


def test_langevin_has_the_exact_variance_at_any_stable_step_and_sgld_the_inflated_one():
    # Target variance 1/(nβ a + γ) = 1/10. SGLD's chain is an AR(1) with variance 1/(λ (1 − ελ/4)).
    shared = {"nbeta": 4.0, "gamma": 2.0}
    exact = stationary_variance(langevin, langevin.LangevinConfig(**shared, friction=2.0), 0.2, 2.0)
    inflated = stationary_variance(sgld, sgld.SGLDConfig(**shared), 0.2, 2.0)
    # 4096 chains and some independent draws each: a relative standard error below 0.5 %.
    assert exact == pytest.approx(0.1, rel=0.015)
    assert inflated == pytest.approx(0.1 / (1 - 0.2 * 10 / 4), rel=0.015)


def test_thermostat_absorbs_isotropic_gradient_noise():
    config = sgnht.SGNHTConfig(nbeta=1.0, gamma=0.0, diffusion=0.1)
    chains = torch.zeros(1, 4096, dtype=torch.float64)
    noise, disturbance = Stream(4, "test/noise"), Stream(5, "test/noise")
    state = sgnht.init(
        config, chains, torch.full((1, 1), 0.01, dtype=torch.float64), noise.normal(0, (1, 4096)).double()
    )
    total = 0.0
    for step in range(1, 1501):
        gradient = state.position + 2.0 * disturbance.normal(step, (1, 4096)).double()
        state = sgnht.step(config, state, gradient, noise.normal(step, (1, 4096)).double())
        if step > 700:
            total += float(state.position.square().mean()) / 800
    assert float(state.thermostat) > 0.1
    assert total == pytest.approx(1.0, rel=0.08)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("size", [(3, 1), (8, 1009), (1, 40_000)])
def test_the_compiled_langevin_step_has_pytorchs_bits(size, decay, monkeypatch):
    config = langevin.LangevinConfig(nbeta=123.4, gamma=3.3, weight_decay=decay)
    stream = Stream(1, "compiled-step")
    away, momentum, gradient, noise = (stream.normal(step, size) for step in range(4))
    anchor = stream.child("anchor").normal(0, size[1:]).expand(size)
    state = langevin.LangevinState(anchor + 0.01 * away, anchor, torch.full((size[0], 1), 1e-4), momentum)
    compiled = langevin.step(config, state, gradient, noise)
    monkeypatch.setattr(langevin, "langevin_step", lambda *_: None)
    plain = langevin.step(config, state, gradient, noise)
    assert torch.equal(compiled.position, plain.position)
    assert torch.equal(compiled.momentum, plain.momentum)


def test_the_thermostat_without_noise_starts_at_rest():
    config = sgnht.SGNHTConfig(nbeta=1.0, gamma=1.0, noise_level=0.0)
    anchor = torch.ones(3)
    state = sgnht.init(config, anchor, torch.tensor([0.01]), torch.randn(3))
    assert torch.equal(sgnht.step(config, state, torch.zeros(3), torch.randn(3)).position, anchor)
