"""Localisation in units of the weights: which changes of the weights it does not see."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from icl.evals import mse_loss
from icl.model import InContextRegressionTransformer
from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.transformer_objective import make_objective
from icl.sampling.units import units_of
from icl.streams import Stream
from icl.tasks import RegressionTask

CONFIG = SamplerConfig(
    sampling_method="langevin", num_chains=2, num_draws=30, epsilon=1e-4, gamma=30.0, nbeta=20.0, init_seed=3
)
RELATIVE = CONFIG.model_copy(update={"localization_units": "relative"})
Change = Callable[[dict[str, Tensor]], None]


def model_with(change: Change) -> InContextRegressionTransformer:
    """A transformer whose streams are large beside the layer norms' ε, after the change."""
    model = InContextRegressionTransformer(3, 5, embed_size=14, mlp_size=11, num_heads=2, num_layers=2, seed=1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if "embedding" in name:
            value *= 30
        if "norm" in name:
            value += 0.1 * Stream(7, name).normal(0, tuple(value.shape))
        if name.startswith("unembedding"):
            value *= 0.3
    change(weights)
    model.load_state_dict(weights)
    return model.double()


def batches(step: int) -> tuple[Tensor, Tensor]:
    xs, ys = RegressionTask(3, 5, noise_variance=0.1).sample(Stream(5, "sampling"), step, 31)
    return xs.double(), ys.double()


def nothing(weights: dict[str, Tensor]) -> None:
    pass


def writers(weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if ("embedding" in name and "un" not in name) or "attention.output" in name or "mlp.down" in name:
            value *= 3


def norm_and_reader(weights: dict[str, Tensor]) -> None:
    for name in ("weight", "bias"):
        weights[f"blocks.1.mlp_norm.{name}"] *= 3
    weights["blocks.1.mlp.up.weight"] /= 3


def queries_and_keys(weights: dict[str, Tensor]) -> None:
    rows = weights["blocks.0.attention.qkv.weight"].view(2, 3, 7, 14)
    rows[1, 0] *= 3
    rows[1, 1] /= 3


def values_and_output(weights: dict[str, Tensor]) -> None:
    weights["blocks.1.attention.qkv.weight"].view(2, 3, 7, 14)[0, 2] *= 3
    weights["blocks.1.attention.output.weight"][:, :7] /= 3


def hidden_layer(weights: dict[str, Tensor]) -> None:
    for name in ("weight", "bias"):
        weights[f"blocks.0.mlp.up.{name}"] *= 3
    weights["blocks.0.mlp.down.weight"] /= 3


@cache
def estimate(change: Change, units: str) -> Tensor:
    config = RELATIVE if units == "relative" else CONFIG
    return estimate_llc(model_with(change), mse_loss, batches, config).llc_per_chain


@pytest.mark.parametrize("change", [writers, norm_and_reader, queries_and_keys, values_and_output, hidden_layer])
def test_what_leaves_the_function_alone_leaves_the_estimate_alone(change):
    xs, ys = batches(0)
    torch.testing.assert_close(model_with(change)(xs, ys), model_with(nothing)(xs, ys), rtol=1e-5, atol=1e-5)
    before, after = estimate(nothing, "relative"), estimate(change, "relative")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_an_absolute_localisation_sees_the_scale_of_what_writes_to_the_stream():
    before, after = estimate(nothing, "absolute"), estimate(writers, "absolute")
    assert ((after - before).abs() > 5e-4 * before.abs()).all()  # the invariance is held to 1e-5


def test_units_are_the_root_mean_square_of_each_group():
    weights, groups = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]), torch.tensor([0, 1, 0, 1, 2])
    units = units_of(weights, groups)
    torch.testing.assert_close(units, torch.tensor([12.5, 5.0, 12.5, 5.0, 5.0]).sqrt())
    with pytest.raises(ValueError, match="absolute"):
        units_of(torch.zeros(3), torch.zeros(3, dtype=torch.long))


def test_a_linear_model_in_relative_units_is_the_same_model_with_scaled_inputs():
    """L(s u) of a linear model is that of inputs s x: the two estimates share every draw."""
    inputs, weights = Stream(2, "inputs").normal(0, (101, 3)).double(), torch.tensor([[0.5, -2.0, 7.0]]).double()
    labels = inputs @ weights.T + Stream(2, "noise").normal(0, (101, 1)).double()
    unit = weights.square().mean().sqrt()

    def linear(weight: Tensor) -> nn.Module:
        model = nn.Linear(3, 1, bias=False).double()
        model.weight.data = weight.clone()
        return model

    def loss(predict: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (predict(batch[0]) - batch[1]).square().mean()

    relative = estimate_llc(linear(weights), loss, lambda step: (inputs, labels), RELATIVE)
    scaled = estimate_llc(linear(weights / unit), loss, lambda step: (inputs * unit, labels), CONFIG)
    torch.testing.assert_close(relative.llc_per_chain, scaled.llc_per_chain, rtol=1e-6, atol=1e-6)


def test_restriction_keeps_the_units_of_what_is_sampled():
    config = RELATIVE.model_copy(update={"include": ("blocks.0.attention.**",)})
    objective = make_objective(model_with(nothing), mse_loss, config)
    qkv, output = objective.groups[: 3 * 14 * 14], objective.groups[3 * 14 * 14 :]
    assert len(qkv.unique()) == 6
    assert len(output.unique()) == 2
    assert not set(qkv.tolist()) & set(output.tolist())
    assert objective.groups.view(-1, 14)[:7].unique().numel() == 1  # the first head's queries


def test_what_takes_weights_is_not_handed_positions_in_units():
    objective = make_objective(model_with(nothing), mse_loss, RELATIVE)
    assert objective.bytes_for_backward(batches(0)) == objective.objective.bytes_for_backward(batches(0))
    with pytest.raises(AttributeError, match="sequence_losses"):
        objective.sequence_losses(objective.anchor[None], batches(0))
