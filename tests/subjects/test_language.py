"""The language model: equal to the public implementation, causal, and its weights by their public names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from icl.evals import weight_norm
from icl.sampling import SamplerConfig, estimate_llc
from icl.subjects.language import (
    AttentionOnlyTransformer,
    LanguageShape,
    initial_parameters,
    logits_of,
    next_token_loss,
    parameter_sizes,
    shape_of,
    token_losses,
)

PARITY = np.load(Path(__file__).parents[1] / "fixtures" / "language_parity.npz")
"""Two small models of TransformerLens 2.18: weights, tokens, and what it makes of them."""
MODELS = ("model0", "model1")
SHAPE = LanguageShape(n_layers=2, d_model=11, n_heads=3, d_head=5, n_ctx=13, d_vocab=17)


def stored(model: str, name: str) -> torch.Tensor:
    return torch.from_numpy(PARITY[f"{model}/{name}"])


def stored_state(model: str) -> dict[str, torch.Tensor]:
    prefix = f"{model}/state/"
    return {key.removeprefix(prefix): torch.from_numpy(PARITY[key]) for key in PARITY.files if key.startswith(prefix)}


def settings_of(model: str) -> dict[str, int]:
    config = json.loads(bytes(PARITY[f"{model}/config"]))
    return {name: config[name] for name in LanguageShape.__dataclass_fields__}


@pytest.fixture
def model() -> AttentionOnlyTransformer:
    return AttentionOnlyTransformer(**vars(SHAPE), seed=3)


def some_tokens(rows: int = 7, length: int = 13) -> torch.Tensor:
    return torch.randint(0, SHAPE.d_vocab, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_public_implementation(name):
    model = AttentionOnlyTransformer(**settings_of(name))
    model.load_state_dict(stored_state(name))  # the masks in it are no weights
    tokens = stored(name, "tokens")
    logits = model(tokens)
    torch.testing.assert_close(logits, stored(name, "logits"), rtol=0, atol=1e-5)
    torch.testing.assert_close(token_losses(logits, tokens), stored(name, "loss_per_token"), rtol=0, atol=1e-5)
    for layer, pattern in enumerate(model.patterns(tokens)):
        torch.testing.assert_close(pattern, stored(name, f"pattern{layer}"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_follow_from_the_weights(name):
    assert vars(shape_of(stored_state(name))) == settings_of(name)


def test_the_published_model_has_its_number_of_parameters_and_its_norm():
    """Of the published curve's first row, which is taken after one update: 95.567."""
    model = AttentionOnlyTransformer(seed=0)
    assert sum(value.numel() for value in model.parameters()) == 3_355_016 == model.shape.num_parameters
    norm = weight_norm(model.state_dict())
    assert abs(norm - 95.567) < 0.3


def test_a_logit_depends_on_no_later_token(model):
    tokens = some_tokens()
    logits = model(tokens)
    for place in range(1, SHAPE.n_ctx):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 1) % SHAPE.d_vocab
        assert torch.equal(model(changed)[:, :place], logits[:, :place])
        assert not torch.equal(model(changed)[:, place:], logits[:, place:])


def test_no_gradient_flows_from_later_tokens(model):
    place = 6
    embedded = model.get_parameter("embed.W_E").detach()[some_tokens(1)].requires_grad_()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    parameters["embed.W_E"] = embedded[0]
    logits = logits_of(parameters, torch.arange(SHAPE.n_ctx)[None])
    (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), embedded)
    assert (gradient[0, place + 1 :] == 0).all()
    assert (gradient[0, : place + 1] != 0).any(dim=1).all()


def test_a_shorter_row_is_the_beginning_of_a_longer_one(model):
    tokens = some_tokens()
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_attention_by_hand():
    """One head of width 1 whose scores are q·k with q, k the first channel of LN(h) + P, written as loops."""
    shape = LanguageShape(1, 2, 1, 1, 3, 2)
    parameters = {name: torch.zeros(size) for name, size in parameter_sizes(shape).items()}
    parameters["embed.W_E"] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    parameters["pos_embed.W_pos"] = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.25, 0.0]])
    parameters["blocks.0.ln1.w"] = parameters["ln_final.w"] = torch.ones(2)
    for kind in "QKV":
        parameters[f"blocks.0.attn.W_{kind}"] = torch.tensor([[[1.0], [0.0]]])
    tokens, norm = [0, 1, 0], 1 / (1 + 1e-5) ** 0.5  # LN of ±(1, -1) is itself up to ε
    model = AttentionOnlyTransformer.from_weights(parameters)
    (pattern,) = model.patterns(torch.tensor([tokens]))
    values = [norm if token == 0 else -norm for token in tokens]
    places = [value + offset for value, offset in zip(values, [0.0, 0.5, 0.25], strict=True)]
    for query in range(3):
        weights = torch.tensor([places[query] * places[key] for key in range(query + 1)]).softmax(0)
        torch.testing.assert_close(pattern[0, 0, query, : query + 1], weights)


def test_without_positions_the_order_of_the_past_does_not_matter():
    parameters = initial_parameters(LanguageShape(1, 11, 3, 5, 13, 17), 3)
    tokens = some_tokens()
    swapped = tokens[:, torch.tensor([1, 0, *range(2, 13)])]
    one, other = (logits_of(parameters, each, positions=False)[:, -1] for each in (tokens, swapped))
    torch.testing.assert_close(one, other)
    one, other = (logits_of(parameters, each)[:, -1] for each in (tokens, swapped))
    assert (one - other).abs().max() > 1e-4


def test_initial_weights_are_a_function_of_the_seed():
    one, other = AttentionOnlyTransformer(**vars(SHAPE), seed=1), AttentionOnlyTransformer(**vars(SHAPE), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    another = AttentionOnlyTransformer(**vars(SHAPE), seed=2)
    assert not torch.equal(one.get_parameter("embed.W_E"), another.get_parameter("embed.W_E"))


@pytest.mark.parametrize("length", [0, 14])
def test_rows_that_do_not_fit_are_refused(model, length):
    with pytest.raises(ValueError, match="1 to n_ctx=13 tokens"):
        model(torch.zeros(2, length, dtype=torch.long))


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="n_heads must be at least 1, got 0"):
        AttentionOnlyTransformer(n_heads=0)


def test_the_learning_coefficient_of_a_language_model(model):
    """Chains by functional calls and by vmap: finite, above zero, one loss per position."""
    config = SamplerConfig(num_chains=2, num_draws=20, epsilon=1e-4, gamma=10.0, nbeta=10.0, init_seed=0)
    batches = [(some_tokens(5),), (some_tokens(5).flip(0),)]
    result = estimate_llc(model, next_token_loss, batches, config)
    assert result.llc_per_token.shape == (SHAPE.n_ctx - 1,)
    assert result.loss_trace.isfinite().all()
    with torch.no_grad():
        assert result.init_loss == pytest.approx(
            float(token_losses(model(some_tokens(5)), some_tokens(5)).mean()), rel=1e-5
        )
