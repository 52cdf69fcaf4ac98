"""The transformer: sizes, causality, trimming, activations, and a plain-loop reading of its formula."""

import math

import pytest
import torch

from icl.model import (
    InContextRegressionTransformer,
    TransformerShape,
    flatten,
    initial_parameters,
    parameter_layout,
    predict,
    predict_with_activations,
    unflatten,
)
from icl.streams import Stream

SHAPES = [
    TransformerShape(3, 5, 14, 11, 2, 1),
    TransformerShape(2, 7, 15, 13, 3, 3, residual="single"),
    TransformerShape(5, 3, 22, 29, 11, 2, include_output=False),
    TransformerShape(3, 5, 10, 7, 5, 2, layer_norm=False),
    TransformerShape(3, 4, 26, 17, 2, 2),  # the first block by its features, as the paper's model
]


def random_parameters(shape: TransformerShape, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Parameters without special values, so that no term of the formula hides."""
    flat = Stream(5, "parameters").normal(0, (shape.num_parameters,)).to(dtype) * 0.4
    return unflatten(shape, flat)


def random_batch(shape: TransformerShape, batch_size: int, examples: int, dtype=torch.float64):
    stream = Stream(6, "batch")
    return (
        stream.normal(0, (batch_size, examples, shape.task_size)).to(dtype),
        stream.normal(1, (batch_size, examples, 1)).to(dtype),
    )


@pytest.mark.parametrize(("max_examples", "expected"), [(8, 51_717), (16, 52_741)])
def test_the_papers_models_have_the_published_number_of_parameters(max_examples, expected):
    model = InContextRegressionTransformer(4, max_examples, 64, 64, 4, 2)
    assert sum(p.numel() for p in model.parameters()) == expected == model.shape.num_parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_trimmed_and_full_computation_agree_to_rounding(shape):
    parameters = random_parameters(shape)
    xs, ys = random_batch(shape, 7, shape.max_examples)
    full, _ = predict_with_activations(shape, parameters, xs, ys)
    torch.testing.assert_close(predict(shape, parameters, xs, ys), full, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_follow_the_formula_written_as_loops(shape):
    p = random_parameters(shape)
    xs, ys = random_batch(shape, 1, shape.max_examples - 1)
    tokens = []
    for x, y in zip(xs[0], ys[0], strict=True):
        tokens += [torch.cat((torch.zeros(1), x)), torch.cat((y, torch.zeros(shape.task_size)))]

    def norm(name, v):
        if not shape.layer_norm:
            return v
        centred = v - v.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    h = [p["token_embedding.weight"] @ t.double() + p["position_embedding.weight"][:, i] for i, t in enumerate(tokens)]
    width = shape.embed_size // shape.num_heads
    for layer in range(shape.num_layers):
        block = f"blocks.{layer}"
        qkv = [p[f"{block}.attention.qkv.weight"] @ norm(f"{block}.attention_norm", v) for v in h]
        after = []
        for i in range(len(h)):
            heads = []
            for head in range(shape.num_heads):
                rows = [v[3 * width * head : 3 * width * (head + 1)] for v in qkv]
                scores = [
                    math.exp(float(rows[i][:width] @ rows[j][width : 2 * width]) / math.sqrt(width))
                    for j in range(i + 1)
                ]
                heads.append(sum(s * rows[j][2 * width :] for j, s in enumerate(scores)) / sum(scores))
            attended = torch.cat(heads)
            if shape.include_output:
                attended = p[f"{block}.attention.output.weight"] @ attended
            a = h[i] + attended
            hidden = p[f"{block}.mlp.up.weight"] @ norm(f"{block}.mlp_norm", a) + p[f"{block}.mlp.up.bias"]
            out = a + p[f"{block}.mlp.down.weight"] @ hidden.clamp(min=0) + p[f"{block}.mlp.down.bias"]
            after.append(out + h[i] if shape.residual == "doubled" else out)
        h = after
    outputs = [p["unembedding.weight"] @ norm("final_norm", v) + p["unembedding.bias"] for v in h]
    expected = torch.stack([v[0] for v in outputs[::2]])
    torch.testing.assert_close(predict(shape, p, xs, ys)[0, :, 0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_later_pair_never_changes_an_earlier_prediction(shape):
    parameters = random_parameters(shape, torch.float32)
    xs, ys = random_batch(shape, 7, shape.max_examples, torch.float32)
    before = predict(shape, parameters, xs, ys)
    cut = shape.max_examples // 2
    other_xs, other_ys = xs.clone(), ys.clone()
    other_xs[:, cut + 1 :] += 3
    other_ys[:, cut:] -= 5  # prediction `cut` may use x_cut, never y_cut
    after = predict(shape, parameters, other_xs, other_ys)
    assert torch.equal(before[:, : cut + 1], after[:, : cut + 1])
    assert not torch.equal(before[:, cut + 1 :], after[:, cut + 1 :])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_label_is_never_read(shape):
    parameters = random_parameters(shape)
    xs, ys = random_batch(shape, 3, shape.max_examples)
    unknown = ys.clone()
    unknown[:, -1] = float("nan")
    assert torch.equal(predict(shape, parameters, xs, unknown), predict(shape, parameters, xs, ys))


@pytest.mark.parametrize("size", [1.0, 100.0, 10_000.0])
def test_tokens_and_positions_that_cancel_cost_no_more_digits_than_in_the_full_computation(size):
    shape = TransformerShape(4, 8, 64, 64, 4, 2)
    parameters = initial_parameters(shape, 3)
    large = size * Stream(7, "cancel").normal(0, (shape.embed_size,))
    parameters["token_embedding.weight"][:, 1] += large
    parameters["position_embedding.weight"][:, 0::2] -= large[:, None]
    xs, ys = random_batch(shape, 16, 8, torch.float32)
    xs[..., 0] = 1  # so that both add up to what they were
    precise = {name: value.double() for name, value in parameters.items()}
    exact, _ = predict_with_activations(shape, precise, xs.double(), ys.double())
    full, _ = predict_with_activations(shape, parameters, xs, ys)
    error, usual = ((each - exact).abs().max() for each in (predict(shape, parameters, xs, ys), full))
    assert error <= 8 * usual


def test_a_shorter_sequence_gives_the_first_predictions():
    shape = SHAPES[0]
    parameters = random_parameters(shape)
    xs, ys = random_batch(shape, 7, shape.max_examples)
    torch.testing.assert_close(
        predict(shape, parameters, xs[:, :2], ys[:, :2]), predict(shape, parameters, xs, ys)[:, :2]
    )


def test_attention_patterns_are_causal_distributions():
    shape = SHAPES[1]
    model = InContextRegressionTransformer.from_shape(shape, seed=0)
    xs, ys = random_batch(shape, 5, shape.max_examples, torch.float32)
    predictions, activations = model(xs, ys, activations=["blocks.1.attention.pattern", "tokens"])
    pattern = activations["blocks.1.attention.pattern"]
    assert pattern.shape == (5, shape.num_heads, 14, 14)
    torch.testing.assert_close(pattern.sum(dim=-1), torch.ones(5, shape.num_heads, 14))
    assert not pattern.triu(1).any()
    assert torch.equal(activations["tokens"][:, 0::2, :1], predictions)


def test_flat_vector_and_names_are_two_views_of_the_same_numbers():
    shape = SHAPES[2]
    model = InContextRegressionTransformer.from_shape(shape, seed=3)
    named = dict(model.named_parameters())
    assert list(named) == list(parameter_layout(shape))
    flat = flatten(named)
    assert all(torch.equal(value, named[name]) for name, value in unflatten(shape, flat).items())
    other = InContextRegressionTransformer.from_shape(shape, flat)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_initialisation_is_pytorchs_default_and_a_function_of_the_seed():
    shape = TransformerShape(4, 8, 64, 64, 4, 2)
    parameters = initial_parameters(shape, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(parameters.values(), initial_parameters(shape, 1).values(), strict=True)
    )
    for name, value in parameters.items():
        layer = name.rsplit(".", 1)[0]
        if layer.endswith("norm"):
            assert torch.equal(value, torch.ones(64) if name.endswith("weight") else torch.zeros(64))
            continue
        bound = 1 / math.sqrt(parameters[f"{layer}.weight"].shape[1])
        assert float(value.abs().max()) <= bound
        if value.numel() > 1000:
            assert float(value.double().var()) == pytest.approx(bound**2 / 3, rel=0.1)


def test_vmap_over_members_equals_a_loop():
    shape = SHAPES[0]
    flats = Stream(1, "members").normal(0, (3, shape.num_parameters)).double() * 0.3
    xs, ys = random_batch(shape, 5, shape.max_examples)
    together = torch.func.vmap(lambda flat: predict(shape, unflatten(shape, flat), xs, ys))(flats)
    alone = torch.stack([predict(shape, unflatten(shape, flat), xs, ys) for flat in flats])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "does not divide"),
        ({"max_examples": 0}, "max_examples"),
        ({"residual": "triple"}, "residual"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    sizes = {"task_size": 3, "max_examples": 5, "embed_size": 14, "mlp_size": 11, "num_heads": 2, "num_layers": 1}
    with pytest.raises(ValueError, match=message):
        InContextRegressionTransformer(**{**sizes, **changes})


def test_inputs_that_do_not_fit_are_refused():
    model = InContextRegressionTransformer(3, 5, 14, 11, 2, 1, seed=0)
    for xs, ys in [((7, 6, 3), (7, 6, 1)), ((7, 5, 2), (7, 5, 1)), ((7, 5, 3), (7, 4, 1))]:
        with pytest.raises(ValueError, match="expected xs"):
            model(torch.zeros(xs), torch.zeros(ys))
    with pytest.raises(ValueError, match="no activation"):
        model(torch.zeros(2, 5, 3), torch.zeros(2, 5, 1), activations=["blocks.9.input"])
