import math

import numpy as np
import pytest
import torch

from icl.analysis.attention import attention_metrics, attention_patterns, attention_table
from icl.model import InContextRegressionTransformer

GENERATOR = torch.Generator().manual_seed(0)
B, H, T = 13, 2, 7


def random_pattern() -> torch.Tensor:
    scores = 3 * torch.randn(B, H, T, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    future = torch.ones(T, T).triu(1).bool()
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


def by_loops(a) -> dict[str, np.ndarray]:
    """The definitions, one number at a time."""
    mean = a.mean(axis=0)
    names = (
        "entropy entropy_normalized variability self_attn prev_token_attn first_token_attn prev_x_attn prev_y_attn "
        "x_tokens_attn distance key_position hardness"
    )
    out = {name: np.zeros((H, T)) for name in names.split()}
    for h in range(H):
        for q in range(T):
            keys = range(q + 1)
            x_before = [k for k in range(q) if k % 2 == 0]
            y_before = [k for k in range(q) if k % 2 == 1]
            entropies = [-sum(a[b, h, q, k] * math.log2(a[b, h, q, k]) for k in keys) for b in range(B)]
            out["entropy"][h, q] = np.mean(entropies)
            out["entropy_normalized"][h, q] = np.mean(entropies) / math.log2(q + 1) if q else math.nan
            out["variability"][h, q] = np.mean(
                [sum(abs(a[b, h, q, k] - mean[h, q, k]) for k in keys) / 2 for b in range(B)]
            )
            out["self_attn"][h, q] = mean[h, q, q]
            out["prev_token_attn"][h, q] = mean[h, q, q - 1] if q else 0
            out["first_token_attn"][h, q] = mean[h, q, 0]
            out["prev_x_attn"][h, q] = mean[h, q, x_before[-1]] if x_before else 0
            out["prev_y_attn"][h, q] = mean[h, q, y_before[-1]] if y_before else 0
            out["x_tokens_attn"][h, q] = sum(mean[h, q, k] for k in keys if k % 2 == 0)
            out["distance"][h, q] = sum((q - k) * mean[h, q, k] for k in keys)
            out["key_position"][h, q] = sum(k * mean[h, q, k] for k in keys) / (q + 1)
            out["hardness"][h, q] = np.mean([sum(a[b, h, q, k] <= 1e-3 for k in keys) for b in range(B)]) / (q + 1)
    return out


def test_every_metric_is_its_definition():
    pattern = random_pattern()
    pattern[:, :, 5, :] = torch.eye(T, dtype=torch.float64)[2]  # hard attention: entropy 0, hardness 5/6
    ours, expected = attention_metrics(pattern), by_loops(np.clip(pattern.numpy(), 1e-300, None))
    assert set(ours) == set(expected)
    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-10, err_msg=name)


def test_uniform_attention():
    pattern = torch.ones(3, 1, 5, 5).tril() / torch.arange(1, 6)[:, None]
    metrics = {name: value[0].tolist() for name, value in attention_metrics(pattern).items()}
    assert metrics["entropy_normalized"][1:] == pytest.approx([1] * 4)
    assert math.isnan(metrics["entropy_normalized"][0])
    assert metrics["variability"] == pytest.approx([0] * 5)
    assert metrics["distance"] == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert metrics["hardness"] == pytest.approx([0] * 5)


def test_previous_token_head():
    pattern = torch.zeros(3, 1, 5, 5)
    pattern[:, :, torch.arange(5), [0, 0, 1, 2, 3]] = 1
    metrics = {name: value[0].tolist() for name, value in attention_metrics(pattern).items()}
    assert metrics["prev_token_attn"] == [0, 1, 1, 1, 1]
    assert metrics["distance"] == [0, 1, 1, 1, 1]
    assert metrics["entropy"] == [0] * 5
    assert metrics["x_tokens_attn"] == [1, 1, 0, 1, 0]
    assert metrics["prev_x_attn"] == [0, 1, 0, 1, 0]
    assert metrics["prev_y_attn"] == [0, 0, 1, 0, 1]


def test_variability_of_two_disjoint_patterns_is_half():
    pattern = torch.zeros(2, 1, 3, 3)
    pattern[0, 0, :, 0] = 1
    pattern[1, 0, [0, 1, 2], [0, 1, 2]] = 1
    assert attention_metrics(pattern)["variability"][0].tolist() == [0, 0.5, 0.5]


def small_model() -> tuple[InContextRegressionTransformer, torch.Tensor, torch.Tensor]:
    model = InContextRegressionTransformer(3, 5, embed_size=14, mlp_size=7, num_heads=2, num_layers=2, seed=1)
    xs = torch.randn(11, 5, 3, generator=GENERATOR)
    return model, xs, torch.randn(11, 5, 1, generator=GENERATOR)


def test_patterns_are_causal_distributions_without_the_last_token():
    model, xs, ys = small_model()
    patterns = attention_patterns(model, xs, ys, batch_size=4)
    assert [tuple(pattern.shape) for pattern in patterns] == [(11, 2, 9, 9)] * 2
    for pattern, whole in zip(patterns, attention_patterns(model, xs, ys), strict=True):
        torch.testing.assert_close(pattern, whole)
        torch.testing.assert_close(pattern.sum(dim=-1), torch.ones(11, 2, 9))
        assert (pattern.triu(1) == 0).all()


def test_a_row_of_the_table_is_a_head_and_a_token():
    model, xs, ys = small_model()
    table = attention_table(model, xs, ys)
    assert len(table) == 2 * 2 * 9
    metric = attention_metrics(attention_patterns(model, xs, ys)[1])["entropy"][1, 4]
    row = table[(table["block"] == 1) & (table["head"] == 1) & (table["token"] == 4)]
    assert row["entropy"].item() == pytest.approx(float(metric))


def test_refuses_what_is_not_a_pattern():
    with pytest.raises(ValueError, match="pattern"):
        attention_metrics(torch.ones(2, 3, 4))
