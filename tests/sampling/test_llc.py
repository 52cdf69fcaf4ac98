"""Estimates: closed forms, identities, health, and what must not change."""

import gc
import math
import threading
import time
import weakref

import pytest
import torch
from torch import nn

from icl.engine import mse_loss
from icl.model import InContextRegressionTransformer, TransformerShape
from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.chains import run_chains
from icl.sampling.diagnostics import student_factor
from icl.sampling.noise import chain_seeds
from icl.sampling.objective import ModuleObjective
from icl.sampling.plan import AnchorLosses, Plan, token_weights_of
from icl.sampling.stein import Ratio
from icl.sampling.transformer_objective import TransformerObjective, make_objective
from icl.sampling.verdict import Evidence, judge
from icl.streams import Stream

D = 5
INPUTS = Stream(0, "test/inputs").normal(0, (31, D))
SHORT = SamplerConfig(num_chains=3, num_draws=20, epsilon=1e-3, gamma=1.0, nbeta=10.0, init_seed=7)


def squares(predict, batch):
    return predict(batch).square().mean()


def token_squares(predict, batch):
    """One loss per "token": three parts of the batch."""
    return torch.stack([predict(part).square().mean() for part in batch.chunk(3)])


def linear() -> nn.Module:
    """y = w·x at w* = 0, where L = wᵀ (XᵀX/n) w."""
    model = nn.Linear(D, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def exact_llc(nbeta: float, gamma: float) -> float:
    """nβ E[L] under the Gaussian of precision nβH + γ: Σ ½ nβh/(nβh + γ)."""
    curvature = torch.linalg.eigvalsh(2 * INPUTS.T @ INPUTS / len(INPUTS))
    return float((0.5 * nbeta * curvature / (nbeta * curvature + gamma)).sum())


def test_the_default_kernel_recovers_the_gaussians_closed_form():
    config = SamplerConfig(num_chains=8, num_draws=1500, num_burnin_steps=300, gamma=2.0, nbeta=30.0, init_seed=0)
    result = estimate_llc(linear(), squares, [INPUTS], config)
    assert result.ess > 500
    assert abs(result.llc_mean - exact_llc(30.0, 2.0)) < 4 * result.llc_mcse
    assert result.llc_mcse < 0.05 * result.llc_mean
    assert result.verdict.trusted, result.verdict.text
    assert result.rhat < 1.05
    assert result.init_loss == 0.0


def test_promised_fields_and_shapes():
    result = estimate_llc(linear(), squares, [INPUTS], SHORT)
    assert isinstance(result.llc_mean, float)
    assert isinstance(result.llc_std, float)
    assert result.llc_per_chain.shape == (3,)
    assert result.loss_trace.shape == (3, 20)
    assert float(result.llc_per_chain.mean()) == pytest.approx(result.llc_mean)
    assert float(result.llc_per_chain.std()) == pytest.approx(result.llc_std)
    assert result.llc_mean == pytest.approx(10.0 * (float(result.loss_trace.mean()) - result.init_loss), rel=1e-5)
    assert result.num_samples == len(INPUTS)
    assert result.wbic == pytest.approx(len(INPUTS) * result.mean_loss)
    assert torch.equal(result.running[:, -1], result.excess_trace.cumsum(1)[:, -1] / 20)


def test_the_mean_of_the_token_estimates_is_the_estimate():
    whole = estimate_llc(linear(), token_squares, [INPUTS[:30]], SHORT)
    assert whole.llc_per_token.shape == (3,)
    assert float(whole.llc_per_token.mean()) == pytest.approx(whole.llc_mean, rel=1e-12)
    scalar = estimate_llc(linear(), lambda p, b: token_squares(p, b).mean(), [INPUTS[:30]], SHORT)
    assert scalar.llc_mean == pytest.approx(whole.llc_mean, rel=1e-5)


def plan_of(model, batches, config) -> Plan:
    objective = ModuleObjective(model, squares)
    return Plan(config, objective, batches, AnchorLosses(objective))


def test_a_chain_is_the_same_alone_in_company_and_in_threads():
    together = estimate_llc(linear(), squares, [INPUTS], SHORT)
    alone = run_chains(plan_of(linear(), lambda step: INPUTS, SHORT), chain_seeds(7, 3, "independent")[1:2])
    threads = estimate_llc(linear(), squares, [INPUTS], SHORT.model_copy(update={"cores": 2}))
    small = estimate_llc(linear(), squares, [INPUTS], SHORT.model_copy(update={"max_memory_bytes": 1}))
    torch.testing.assert_close(together.run.losses[1:2], alone.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(together.loss_trace, threads.loss_trace, rtol=1e-5, atol=0)
    torch.testing.assert_close(together.loss_trace, small.loss_trace, rtol=1e-5, atol=0)


class Yielding(nn.Module):
    """Two layers, between which another thread gets its turn."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, 3, bias=False), nn.Linear(3, 1, bias=False)

    def forward(self, inputs):
        hidden = self.first(inputs)
        time.sleep(2e-3)
        return self.second(hidden)


def test_workers_do_not_see_each_others_weights():
    model = Yielding()
    config = SHORT.model_copy(update={"num_chains": 4, "num_draws": 5, "epsilon": 1e-2})
    one = estimate_llc(model, squares, [INPUTS], config)
    two = estimate_llc(model, squares, [INPUTS], config.model_copy(update={"cores": 4}))
    torch.testing.assert_close(one.loss_trace, two.loss_trace, rtol=1e-5, atol=0)


def test_a_module_that_workers_cannot_copy_is_refused_with_the_remedy():
    model = linear()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="use cores=1"):
        estimate_llc(model, squares, [INPUTS], SHORT.model_copy(update={"cores": 2}))


def test_the_model_is_left_as_it_is_and_the_run_repeats():
    model = linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = SamplerConfig(num_chains=2, num_draws=10, num_burnin_steps=20, nbeta=10.0)
    first = estimate_llc(model, squares, [INPUTS], config)
    again = estimate_llc(model, squares, [INPUTS], first.config)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(first.loss_trace, again.loss_trace, rtol=0, atol=0, equal_nan=True)


def test_strong_localisation_pins_the_chain_and_none_at_nbeta_zero_gives_the_free_gaussian():
    pinned = SHORT.model_copy(update={"gamma": 1e8, "epsilon": 1e-9})
    assert estimate_llc(linear(), squares, [INPUTS], pinned).distance < 1e-3 * math.sqrt(D)
    control = SamplerConfig(
        num_chains=64, num_draws=200, num_burnin_steps=200, epsilon=0.1, gamma=4.0, nbeta=0.0, init_seed=0
    )
    result = estimate_llc(linear(), squares, [INPUTS], control)
    # AR(1) of coefficient 1 − εγ/2: variance 1/(γ(1 − εγ/4)) per coordinate.
    expected = D / (4.0 * (1 - 0.1))
    assert float(result.distances.square().mean()) == pytest.approx(expected, rel=0.05)
    assert result.llc_mean == 0.0
    assert result.control_acceptance > 0.9


def test_a_restricted_chain_leaves_the_other_weights_alone():
    model = nn.Sequential(nn.Linear(D, 3), nn.Linear(3, 1))
    objective = ModuleObjective(model, squares, include=("0.*",), exclude=("*.bias",))
    assert objective.anchor.numel() == 3 * D
    seen = {}

    def watch(predict, batch):
        seen["bias"] = model[1].bias.clone()
        return predict(batch).square().mean()

    estimate_llc(model, watch, [INPUTS], SHORT.model_copy(update={"include": ("0.*",), "exclude": ("*.bias",)}))
    assert torch.equal(seen["bias"], model[1].bias)
    everything = ModuleObjective(model, squares)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved = objective.anchor + 0.1
    flat[: 3 * D] = moved
    torch.testing.assert_close(objective.losses(moved[None], INPUTS), everything.losses(flat[None], INPUTS))
    _, restricted = objective.losses_and_gradients(moved[None], INPUTS)
    _, full = everything.losses_and_gradients(flat[None], INPUTS)
    torch.testing.assert_close(restricted, full[:, : 3 * D])


def test_a_diverged_chain_is_reported_and_left_out():
    class Fragile(nn.Module):
        """A loss that is NaN beyond |w| = 3, far in the tail."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, inputs):
            return torch.where(self.weight.abs() < 3, self.weight, torch.nan) * inputs

    config = SamplerConfig(num_chains=7, num_draws=40, epsilon=0.2, gamma=0.1, nbeta=0.1, init_seed=0)
    result = estimate_llc(Fragile(), squares, [torch.ones(3, 1)], config)
    assert 0 < result.num_lost < 7
    healthy = result.lost_at == 40
    assert torch.isnan(result.llc_per_chain[~healthy]).all()
    assert result.llc_mean == pytest.approx(float(result.excess_trace[healthy].mean()))
    assert f"{result.num_lost} of 7 chains diverged" in result.verdict.text
    none_left = estimate_llc(Fragile(), squares, [torch.ones(3, 1)], config.model_copy(update={"epsilon": 100.0}))
    assert math.isnan(none_left.llc_mean)
    assert not none_left.verdict.trusted


def test_verdicts_name_the_trouble():
    rising = SamplerConfig(num_chains=32, num_draws=90, epsilon=1e-5, gamma=1.0, nbeta=10.0, init_seed=0)
    assert "still rising" in estimate_llc(linear(), squares, [INPUTS], rising).verdict.text
    wide = SamplerConfig(num_chains=8, num_draws=60, epsilon=0.05, gamma=0.0, nbeta=1.0, init_seed=0)
    assert "left the basin" in estimate_llc(linear(), squares, [INPUTS], wide, reference_loss=1e-3).verdict.text
    hill = estimate_llc(
        linear(), lambda p, b: -squares(p, b), [INPUTS], SHORT.model_copy(update={"gamma": 50.0, "nbeta": 1.0})
    )
    assert "no minimum" in hill.verdict.text


@pytest.mark.parametrize("method", ["new-minibatch", "fixed-minibatch", "dataset"])
def test_evaluation_methods_against_a_loop_by_hand(method):
    batches = [INPUTS[i : i + 7] for i in range(0, 28, 7)]
    config = SHORT.model_copy(update={"eval_method": method, "num_draws": 4})
    seen = []
    result = estimate_llc(
        linear(),
        squares,
        batches,
        config,
        eval_batches=batches,
        recorders=[lambda draw, w, chains: seen.append(w.clone())],
    )
    objective = ModuleObjective(linear(), squares)
    for draw, weights in enumerate(seen):
        chosen = {"new-minibatch": [batches[draw]], "fixed-minibatch": batches[:1], "dataset": batches}[method]
        expected = torch.stack([objective.losses(weights, batch)[:, 0] for batch in chosen]).mean(0)
        torch.testing.assert_close(result.loss_trace[:, draw], expected.double(), rtol=1e-5, atol=1e-9)


def test_paired_and_separate_initial_losses_agree_and_pairing_cancels_the_batches_noise():
    model = nn.Linear(D, 1)
    model.load_state_dict({"weight": torch.ones(1, D), "bias": torch.ones(1)})
    batches = [INPUTS[i : i + 3] for i in range(0, 30, 3)]
    paired = estimate_llc(model, squares, batches, SHORT)
    separate = estimate_llc(model, squares, batches, SHORT.model_copy(update={"num_init_loss_batches": 10}))
    assert paired.init_loss == pytest.approx(separate.init_loss, rel=1e-5)
    assert paired.llc_mean == pytest.approx(separate.llc_mean, abs=1e-4)
    assert paired.excess_trace.var() < 0.1 * separate.excess_trace.var()


def test_subsequence_loss_has_the_intended_law():
    # L_t = g_t·w with T = 3 tokens: the driving gradient is the mean of the first k, k uniform on 1..3.

    config = SHORT.model_copy(update={"eval_loss_fn": "subsequence-mse"})
    objective = ModuleObjective(linear(), token_squares)
    weights_at = token_weights_of(Plan(config, objective, lambda step: INPUTS[:30], AnchorLosses(objective)))
    drawn = torch.stack([weights_at(step) for step in range(3000)])
    assert torch.allclose(drawn.sum(1), torch.ones(3000))
    expected = torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]) / 3
    assert torch.allclose(drawn.mean(0), expected, atol=0.03)
    with pytest.raises(ValueError, match="one loss per token"):
        estimate_llc(linear(), squares, [INPUTS], config)


def test_independent_batches_are_functions_of_the_chains_own_seed():
    def batches(step, seed):
        return Stream(seed, "test/data").normal(step, (3, D))

    config = SHORT.model_copy(update={"independent_batches": True})
    together = estimate_llc(linear(), squares, batches, config)
    alone = run_chains(plan_of(linear(), batches, config), chain_seeds(7, 3, "independent")[2:])
    torch.testing.assert_close(together.run.losses[2:], alone.losses, rtol=1e-5, atol=0)


def test_chains_of_two_seeds_share_nothing_unless_the_old_law_is_asked_for():
    drawn = [chain for seed in range(-2, 50) for chain in chain_seeds(seed, 100, "independent")]
    assert len(set(drawn)) == len(drawn)
    assert chain_seeds(0, 5, "independent") == chain_seeds(0, 5, "sequential")

    old = SHORT.model_copy(update={"noise_law": "sequential"})
    zero, one = (
        estimate_llc(linear(), squares, [INPUTS], old.model_copy(update={"init_seed": seed})) for seed in (0, 1)
    )
    assert torch.equal(zero.loss_trace[1:], one.loss_trace[:-1])
    now = estimate_llc(linear(), squares, [INPUTS], SHORT.model_copy(update={"init_seed": 1}))
    assert all(not torch.equal(chain, other) for chain in now.loss_trace for other in one.loss_trace)


def test_estimates_of_ten_seeds_spread_as_their_standard_errors_say():
    config = SamplerConfig(num_chains=4, num_draws=400, num_burnin_steps=100, epsilon=0.02, gamma=1.0, nbeta=10.0)
    results = [
        estimate_llc(linear(), squares, [INPUTS], config.model_copy(update={"init_seed": seed})) for seed in range(10)
    ]
    assert min(result.ess for result in results) > 100
    estimates = torch.tensor([result.llc_mean for result in results]).double()
    # Without Student's factor for four chains; an error of few chains is itself uncertain, so that errors are averaged over seeds.
    errors = torch.tensor([result.llc_mcse for result in results]).double() / student_factor(3)
    statistic = float(estimates.var() / errors.square().mean())
    assert 0.19 < statistic < 3.45, "the central 99 % of Snedecor's law with 9 and 30 degrees of freedom"


def test_batch_noise_heats_the_chain_as_predicted():
    # Gradient noise c·z on a quadratic of curvature h: λ̂ rises by ε nβ² tr C / 8.
    noise = [Stream(0, "test/heat").normal(step, (D,)) for step in range(2000)]

    def loss(predict, step):
        weights = predict(torch.eye(D))[:, 0]
        errors = torch.zeros(D) if step is None else noise[step]
        return weights.square().sum() / 2 + 0.4 * (errors * weights).sum()

    base = SamplerConfig(
        num_chains=64, num_draws=600, num_burnin_steps=200, epsilon=0.01, gamma=0.0, nbeta=10.0, init_seed=0,
        eval_method="fixed-minibatch",
    )  # fmt: skip
    result = estimate_llc(linear(), loss, lambda step: step, base, eval_batches=[None])
    predicted = 0.01 * 100 * 0.16 * D / 8
    assert result.noise_heating == pytest.approx(predicted, rel=0.6)
    discretisation = D / 2 / (1 - 0.1 / 4)
    assert result.llc_mean - discretisation == pytest.approx(predicted, rel=0.35)
    assert "heated" not in result.verdict.text


def test_modules_without_a_loss_at_fixed_weights_are_refused_and_running_statistics_are_constants():
    model = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\).*model.eval\(\)"):
        estimate_llc(model, squares, [INPUTS], SHORT)
    with pytest.raises(ValueError, match=r"Dropout.*model.eval\(\)"):
        estimate_llc(nn.Sequential(model[0], model[2]), squares, [INPUTS], SHORT)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_llc(model, squares, [INPUTS], SHORT)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_singular_fluctuation_of_a_regular_model_is_half_its_dimension():
    # Negative log-likelihood of y ~ N(w·x, 1) at its maximum likelihood: ν̂ → d/2 with nβ = n, up to the spread of residuals.
    targets = Stream(5, "test/targets").normal(0, (31, 1))
    solution = torch.linalg.lstsq(INPUTS, targets).solution
    model = linear()
    model.weight.data = solution.T.clone()
    residual = (targets - INPUTS @ solution)[:, 0]
    scale = float(residual.square().mean())

    def per_sample(predict, batch):
        return (predict(batch[0]) - batch[1]).square()[:, 0] / (2 * scale)

    samples = ModuleObjective(model, per_sample)
    config = SamplerConfig(
        num_chains=16, num_draws=800, num_burnin_steps=300, gamma=1e-3, nbeta=31.0, init_seed=0,
        eval_metrics=("singular-fluctuation",),
    )  # fmt: skip
    result = estimate_llc(
        model, lambda p, b: per_sample(p, b).mean(), [(INPUTS, targets)], config, sample_objective=samples
    )
    # Σ_i Var(ℓ_i) for Gaussian w: ½(xᵢᵀΣxᵢ)² + rᵢ² xᵢᵀΣxᵢ in units of the residual variance, with Σ the posterior covariance.
    leverage = (INPUTS @ torch.linalg.inv(INPUTS.T @ INPUTS) * INPUTS).sum(1)
    expected = 0.5 * float((0.5 * leverage.square() + residual.square() / scale * leverage).sum())
    assert result.singular_fluctuation == pytest.approx(expected, rel=0.08)
    with pytest.raises(ValueError, match="sample_objective"):
        estimate_llc(model, squares, [INPUTS], config)


def test_the_basin_is_judged_by_a_useless_model_and_by_w_star_itself_where_that_is_no_better():
    one, nothing = Ratio(1.0, 0.01), Ratio(0.0, 0.01)
    sound = Evidence(stiff=one, virial=one, temperature=one, cost=nothing, twin=nothing, sensitivity=nothing)

    def text(mean_loss: float, init_loss: float) -> str:
        excess = torch.full((3, 40), mean_loss - init_loss).double()
        return judge(
            excess, num_lost=0, rhat=1.0, ess=500.0, mcse=0.001, mean_loss=mean_loss, init_loss=init_loss, reference_loss=4.0,
            evidence=sound,
        ).text  # fmt: skip

    assert text(3.9, 1.0) == "healthy"
    assert "left the basin" in text(4.1, 1.0)
    # At w* of the reference loss or worse every chain is above it: there a rise of 5 % of it is allowed.
    assert text(4.2, 4.05) == "healthy"
    assert "left the basin" in text(4.3, 4.05)
    # The rim is continuous in L(w*).
    assert text(3.99, 3.8) == text(4.01, 3.82) == "healthy"


def test_losses_that_differentiate_by_themselves_can_be_vectorised():
    def penalised(predict, batch):
        slope = torch.func.grad(lambda scale: predict(scale * batch).square().mean())(torch.tensor(1.0))
        return predict(batch).square().mean() + 0.01 * slope**2

    assert math.isfinite(estimate_llc(linear(), penalised, [INPUTS], SHORT).llc_mean)


def test_asking_for_the_memory_of_a_backward_pass_keeps_none():
    batch = INPUTS.repeat(100, 1)
    alive = weakref.WeakSet()

    def watched(predict, batch):
        hidden = predict(batch).square()
        alive.add(hidden)
        return hidden.mean()

    objective = ModuleObjective(nn.Linear(D, 1), watched, vectorise=True)
    assert objective.bytes_for_backward(batch) > 4 * len(batch)
    gc.collect()
    assert not alive


def test_a_drawn_seed_repeats_the_run_and_may_be_continued():
    settings = {**SHORT.model_dump(exclude_unset=True), "eval_loss_fn": "subsequence-mse", "init_seed": None}
    first = estimate_llc(linear(), token_squares, [INPUTS[:30]], SamplerConfig(**settings))
    assert first.config.init_seed == first.seed
    again = estimate_llc(linear(), token_squares, [INPUTS[:30]], first.config)
    assert torch.equal(again.loss_trace, first.loss_trace)
    goal = {"target_error": 1e-6, "max_draws": 30}
    short = estimate_llc(linear(), token_squares, [INPUTS[:30]], SamplerConfig(**settings, **goal))
    more = SamplerConfig(**settings, **{**goal, "max_draws": 40})
    longer = estimate_llc(linear(), token_squares, [INPUTS[:30]], more, resume=short)
    assert longer.loss_trace.shape[1] == 40
    assert torch.equal(longer.loss_trace[:, :30], short.loss_trace)


def test_the_transformers_engine_takes_no_hooks_and_no_half_precision():
    shape = TransformerShape(task_size=2, max_examples=3, embed_size=4, mlp_size=5, num_heads=2, num_layers=1)
    model = InContextRegressionTransformer.from_shape(shape, seed=0)
    assert isinstance(make_objective(model, mse_loss, SHORT), TransformerObjective)
    model.register_forward_hook(lambda module, inputs, output: 0 * output)
    batch = torch.randn(7, 3, 2), torch.randn(7, 3, 1)
    ablated = make_objective(model, mse_loss, SHORT)
    assert float(ablated.losses(ablated.anchor[None], batch).mean()) == pytest.approx(float(batch[1].square().mean()))
    half = InContextRegressionTransformer.from_shape(shape, seed=0).bfloat16()
    assert make_objective(half, mse_loss, SHORT).anchor.dtype == torch.float32
