"""What `matmul_precision` promises: which products are rounded, how far, and what that does to an estimate."""

import pytest
import torch
from torch import nn

from icl.config import TrainingConfig
from icl.config.language import LanguageTraining
from icl.engine import batched_loss_and_grad, choose_path, matmul_precision, mse_loss
from icl.engine.precision import TF32_EPSILON, to_tf32
from icl.model import InContextRegressionTransformer, TransformerShape, flatten, initial_parameters
from icl.sampling import SamplerConfig, estimate_llc
from icl.streams import Stream
from icl.tasks import RegressionTask

CPU = torch.device("cpu")
SHAPE = TransformerShape(3, 5, 14, 11, 2, 2)
PRECISIONS = ("highest", "tf32x3", "tf32")


def test_tf32_is_the_nearest_number_of_ten_fraction_bits():
    values = Stream(0, "tf32").normal(0, (4096,)) * torch.logspace(-20, 20, 4096)
    rounded = to_tf32(values)
    scale = 2.0 ** values.abs().log2().floor()
    assert ((rounded - values).abs() <= scale * TF32_EPSILON / 2).all()
    multiples = rounded.double() / (scale.double() * TF32_EPSILON)
    assert torch.equal(multiples, multiples.round())
    kept = torch.tensor([0.0, -1.0, 1 + TF32_EPSILON, float("inf"), -float("inf")])
    assert torch.equal(to_tf32(kept), kept)
    assert to_tf32(torch.tensor(float("nan"))).isnan()


PRODUCTS = {
    "linear": lambda a, b: nn.functional.linear(a, b),
    "linear with bias": lambda a, b: nn.functional.linear(a, b, a.new_zeros(len(b))),
    "matmul": lambda a, b: a @ b.T,
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "vmap": lambda a, b: torch.vmap(lambda row: row[None] @ b.T)(a)[:, 0],
    "baddbmm": lambda a, b: torch.baddbmm(a.new_zeros(1, 1, 1), a[None], b.T[None])[0],
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_those_of_rounded_factors(product):
    a, b = Stream(1, "a").normal(0, (17, 29)), Stream(1, "b").normal(0, (13, 29))
    multiply = PRODUCTS[product]
    with matmul_precision("tf32", CPU):
        rounded = multiply(a, b)
    torch.testing.assert_close(rounded, to_tf32(a) @ to_tf32(b).T, rtol=1e-5, atol=1e-5)
    assert (rounded - a @ b.T).abs().max() > 1e-4
    with matmul_precision("tf32x3", CPU):
        split = multiply(a, b)
    torch.testing.assert_close(split.double(), a.double() @ b.double().T, rtol=0, atol=1e-5)
    exact = multiply(a.double(), b.double())
    with matmul_precision("tf32", CPU):
        assert torch.equal(multiply(a.double(), b.double()), exact)  # float64 is left alone
    torch.testing.assert_close(multiply(a, b), a @ b.T, rtol=1e-5, atol=1e-5)  # nothing is left behind


def test_gradients_have_the_precision_too():
    flats = torch.stack([flatten(initial_parameters(SHAPE, seed)) for seed in (1, 2)])
    xs, ys = Stream(2, "xs").normal(0, (2, 31, 5, 3)), Stream(2, "ys").normal(0, (2, 31, 5, 1))
    _, exact = batched_loss_and_grad(SHAPE, flats.double(), xs.double(), ys.double())
    error = {}
    for precision in PRECISIONS:
        with matmul_precision(precision, CPU):
            _, gradients = batched_loss_and_grad(SHAPE, flats, xs, ys)
        error[precision] = float((gradients - exact).norm() / exact.norm())
    assert error["tf32x3"] <= 3 * error["highest"] <= 1e-5
    assert 1e-5 < error["tf32"] < 5e-3


def test_the_native_kernel_is_for_full_precision_alone():
    path = choose_path(SHAPE, precision="tf32")
    assert path.name == "torch"
    assert "tf32" in path.reason


@pytest.mark.parametrize("kind", [TrainingConfig, LanguageTraining])
def test_the_setting_is_never_on_by_itself_and_names_another_run(kind):
    config = kind.parse({"task_config": {"model_seed": 1}})
    assert config.matmul_precision == "highest"
    assert SamplerConfig().matmul_precision == "highest"
    assert kind.parse({"task_config": {"model_seed": 1}, "matmul_precision": "highest"}).name == config.name
    assert kind.parse({"task_config": {"model_seed": 1}, "matmul_precision": "tf32"}).name != config.name


class Own(nn.Module):
    """The library's model as a module that the library does not know."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, xs, ys):
        return self.inner(xs, ys)


@pytest.mark.parametrize("known", [True, False])
def test_the_estimate_hardly_depends_on_the_precision(known):
    """The same chains, in three precisions: with tf32x3 the losses agree nearly to float32, with tf32 λ̂ does within its error."""
    model = InContextRegressionTransformer.from_shape(SHAPE, seed=1)
    law = RegressionTask(3, 5, noise_variance=0.25)
    batches = [law.sample(Stream(5, "sampling"), step, 31) for step in range(8)]
    base = SamplerConfig(
        num_chains=3, num_draws=40, epsilon=1e-4, gamma=30.0, nbeta=20.0, init_seed=3, test_target=False
    )
    found = {
        each: estimate_llc(
            model if known else Own(model), mse_loss, batches, base.model_copy(update={"matmul_precision": each})
        )
        for each in PRECISIONS
    }
    exact, split, rounded = (found[each] for each in PRECISIONS)
    torch.testing.assert_close(split.loss_trace, exact.loss_trace, rtol=1e-4, atol=1e-5)
    assert not torch.equal(rounded.loss_trace, exact.loss_trace)
    assert abs(split.llc_mean - exact.llc_mean) <= 0.01 * exact.llc_mcse
    assert abs(rounded.llc_mean - exact.llc_mean) <= 0.5 * exact.llc_mcse
