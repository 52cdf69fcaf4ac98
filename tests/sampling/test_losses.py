"""Losses as people have them: cross-entropy, batches in pieces, bfloat16, and modules that no vmap takes."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from icl.evals import cross_entropy_loss
from icl.sampling import SamplerConfig, estimate_llc
from icl.sampling.transformer_objective import make_objective

S, T, V = 5, 7, 11
SHORT = SamplerConfig(num_chains=3, num_draws=13, epsilon=1e-4, nbeta=10.0, init_seed=0)


def drawn(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


TOKENS = torch.randint(V, (S, T), generator=torch.Generator().manual_seed(1))
LOGITS = drawn(S, T, V)


def test_tokens_are_the_labels_of_the_logits_before_them():
    expected = F.cross_entropy(LOGITS[:, :-1].reshape(-1, V), TOKENS[:, 1:].reshape(-1))
    for batch in (TOKENS, {"input_ids": TOKENS}, {"input_ids": TOKENS, "labels": TOKENS}):
        for output in (LOGITS, {"logits": LOGITS}, SimpleNamespace(logits=LOGITS)):
            loss = cross_entropy_loss(lambda *inputs, output=output, **named: output, batch)
            torch.testing.assert_close(loss, expected)


def test_padding_counts_for_nothing():
    mask = torch.ones(S, T, dtype=torch.long)
    mask[1, 3:] = mask[4, 6:] = 0
    batch, seen = {"input_ids": TOKENS, "attention_mask": mask}, {}

    def predict(**named):
        seen.update(named)
        return LOGITS

    loss = cross_entropy_loss(predict, batch)
    each = F.cross_entropy(LOGITS[:, :-1].reshape(-1, V), TOKENS[:, 1:].reshape(-1), reduction="none").view(S, T - 1)
    counted = mask[:, 1:].bool()
    torch.testing.assert_close(loss, each[counted].mean())
    assert set(seen) == {"input_ids", "attention_mask"}
    per_token = cross_entropy_loss(predict, batch, "token")
    assert per_token.shape == (T - 1,)
    torch.testing.assert_close(per_token.mean(), loss)
    alone = cross_entropy_loss(predict, batch, "none")
    torch.testing.assert_close(alone, each * counted)
    labels = torch.where(mask.bool(), TOKENS, -100)
    torch.testing.assert_close(cross_entropy_loss(predict, {"input_ids": TOKENS, "labels": labels}), loss)


def test_pairs_are_classified_in_place():
    labels = TOKENS[:, 0]
    torch.testing.assert_close(
        cross_entropy_loss(lambda x: LOGITS[:, 0], (TOKENS, labels)), F.cross_entropy(LOGITS[:, 0], labels)
    )
    pair = cross_entropy_loss(lambda x: LOGITS, (TOKENS, TOKENS))
    torch.testing.assert_close(pair, F.cross_entropy(LOGITS.reshape(-1, V), TOKENS.reshape(-1)))
    with pytest.raises(ValueError, match="do not fit labels"):
        cross_entropy_loss(lambda x: LOGITS, (TOKENS, labels))
    with pytest.raises(ValueError, match="write your own loss"):
        cross_entropy_loss(lambda x: LOGITS, "text")
    with pytest.raises(ValueError, match="without logits"):
        cross_entropy_loss(lambda x: None, TOKENS)


def squares(predict, batch):
    return (predict(batch["inputs"]) - batch["outputs"]).square().mean()


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


BATCH = {"inputs": drawn(18, 3), "outputs": drawn(18, 2)}


@pytest.mark.parametrize("pieces", [4, 18, 50])
def test_accumulation_over_pieces_is_the_whole_batch_to_rounding(pieces):
    objectives = [
        make_objective(network(), squares, SHORT.model_copy(update={"grad_accumulation_steps": count}))
        for count in (1, pieces)
    ]
    positions = objectives[0].anchor + 0.1 * drawn(3, len(objectives[0].anchor))
    whole, parts = (each.losses_and_gradients(positions, BATCH, None) for each in objectives)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(objectives[1].losses(positions, BATCH), whole[0], rtol=1e-5, atol=1e-6)


def test_padded_pieces_weigh_the_labels_that_they_have():
    model = nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, V))
    mask = torch.ones(S, T, dtype=torch.long)
    mask[0, 2:] = 0

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids)

    batch = {"input_ids": TOKENS, "attention_mask": mask}
    one, two = (
        make_objective(Masked(), cross_entropy_loss, SHORT.model_copy(update={"grad_accumulation_steps": count}))
        for count in (1, 2)
    )
    for whole, parts in zip(
        one.losses_and_gradients(one.anchor[None], batch, None),
        two.losses_and_gradients(one.anchor[None], batch, None),
        strict=True,
    ):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_autocast_runs_w_star_and_chains_in_bfloat16_where_asked_alone():
    model, seen = network(), []

    def watched(predict, batch):
        output = predict(batch["inputs"])
        seen.append(output.dtype)
        return (output.float() - batch["outputs"]).square().mean()

    for _ in range(300):  # to a minimum, near which bfloat16 can tell the loss
        loss = squares(model, BATCH)
        for weight, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            weight.data -= 0.1 * gradient
    result = estimate_llc(model, watched, [BATCH], SHORT.model_copy(update={"autocast": "bf16"}))
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    plain = estimate_llc(model, watched, [BATCH], SHORT)
    assert set(seen) == {torch.float32}
    assert result.init_loss != plain.init_loss
    assert result.init_loss == pytest.approx(plain.init_loss, rel=0.02)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, inputs):
        output = self.inner(inputs)
        return output * 2 if output.sum() > 0 else output


def test_a_module_that_no_vmap_takes_runs_chain_by_chain_and_one_line_says_so(caplog):
    with caplog.at_level(logging.INFO):
        result = estimate_llc(Branching(), squares, [BATCH], SHORT)
    assert result.any_healthy
    said = [record for record in caplog.records if "one by one" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING
