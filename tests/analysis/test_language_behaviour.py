"""Behaviour measures of language models, on models made by hand that have or lack the behaviour."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch

from icl.analysis.bigrams import bigram_counts, bigram_entropy, bigram_score, conditional, unigram_entropy
from icl.analysis.composition import k_composition
from icl.analysis.context import in_context_score, score_places
from icl.analysis.induction import prefix_matching_scores, previous_token_scores, repeated_rows, repetition_gain
from icl.analysis.ngrams import common_words, ngram_losses
from icl.subjects.language import token_losses

_spec = importlib.util.spec_from_file_location("by_hand", Path(__file__).parents[1] / "subjects" / "by_hand.py")
assert _spec is not None
assert _spec.loader is not None
by_hand = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

N_CTX, V = by_hand.N_CTX, by_hand.VOCABULARY


def scores(model, samples=211):
    previous = previous_token_scores(model.patterns, V, 0, samples, (5, 11))
    prefix = prefix_matching_scores(model.patterns, V, 0, samples, N_CTX - 1)
    return previous, prefix


def test_an_induction_pair_has_both_scores_and_composition():
    model = by_hand.made_by_hand()
    previous, prefix = scores(model)
    assert previous[0, 0] > 0.99
    assert prefix[1, 0] > 0.9
    assert max(previous[0, 1], previous[1].max()) < 0.5
    assert max(prefix[0].max(), prefix[1, 1]) < 0.3
    composition = k_composition(model.state_dict())
    assert composition[0, 0] > 0.3
    assert (composition.flatten()[1:] == 0).all()


def test_a_previous_token_head_alone_is_no_induction():
    previous, prefix = scores(by_hand.made_by_hand(induction=False))
    assert previous[0, 0] > 0.99
    assert prefix.max() < 0.3


def test_without_its_previous_token_head_an_induction_head_finds_nothing():
    previous, prefix = scores(by_hand.made_by_hand(previous=False))
    assert previous.max() < 0.5
    assert prefix.max() < 0.3


def test_a_model_that_attends_evenly_has_the_scores_of_chance():
    """Every query then gives each of its keys the same attention."""
    previous, prefix = scores(by_hand.made_by_hand(previous=False, induction=False), samples=4001)
    expected = sum(1 / length for length in range(5, 12)) / 7
    torch.testing.assert_close(previous, torch.full((2, 2), expected, dtype=torch.double), rtol=0.02, atol=0)
    half = (N_CTX - 1) // 2
    expected = sum(1 / (second + 1) for second in range(half, N_CTX - 1)) / half
    torch.testing.assert_close(prefix, torch.full((2, 2), expected, dtype=torch.double), rtol=0.02, atol=0)


def test_induction_lowers_the_loss_late_in_rows_that_repeat():
    half = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(seed)) for seed in range(31)])
    rows = torch.cat([half, half, half], dim=1)

    def score(model):
        losses = token_losses(model(rows), rows).detach().mean(dim=0)
        return in_context_score(losses, (2, 2 * V))

    assert score(by_hand.made_by_hand()) < -1
    assert abs(score(by_hand.made_by_hand(induction=False))) < 0.2


def gain_of(model, samples=211):
    return repetition_gain(lambda tokens: token_losses(model(tokens), tokens), V, 0, samples, N_CTX)


def test_only_an_induction_pair_gains_from_what_stands_twice():
    assert gain_of(by_hand.made_by_hand()) < -1
    assert gain_of(by_hand.made_by_hand(induction=False)) == pytest.approx(0, abs=1e-5)
    # Its block 1 favours all that it has read, whatever the order.
    assert gain_of(by_hand.made_by_hand(previous=False)) == pytest.approx(0, abs=1e-4)


def test_bigrams_gain_nothing_and_a_perfect_copy_the_whole_loss():
    logits = torch.randn(V, V, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    bigrams = repetition_gain(lambda tokens: token_losses(logits[tokens], tokens), V, 0, 29, 12)
    assert bigrams == pytest.approx(0, abs=1e-12)

    def copy(tokens):
        again = (tokens[:, 1:6] == tokens[:, 6:]).all(dim=1)
        losses = torch.full((len(tokens), 10), math.log(V))
        losses[again, 6:] = 0.0  # loss 5 is that of the copy's first token
        return losses

    assert repetition_gain(copy, 10**6, 0, 29, 12) == pytest.approx(-math.log(V))


def test_rows_that_repeat():
    same, other = repeated_rows(V, 3, 29, 12)
    assert same.shape == other.shape == (29, 11)
    assert (same[:, 0] == 3).all()
    assert same[:, 1:6].equal(same[:, 6:])
    assert other[:, 6:].equal(same[:, 6:])
    assert not other.equal(same)
    assert other.sort(dim=1).values.equal(same.sort(dim=1).values)
    with pytest.raises(ValueError, match="rows of 5 tokens or more"):
        repetition_gain(lambda tokens: tokens, V, 0, 29, 4)


def test_places_of_the_in_context_score():
    assert score_places(1024) == (50, 500)
    assert score_places(128) == (6, 62)
    losses = torch.arange(1023.0)
    assert in_context_score(losses) == 450
    assert in_context_score(losses, (3, 1000)) == 997
    late, early = sum(i**2 for i in range(90, 111)) / 21, (81 + 100 + 121) / 3
    assert in_context_score(losses.square(), (10, 100), width=0.1) == pytest.approx(late - early)
    with pytest.raises(ValueError, match="0 <= early < late < 1023"):
        in_context_score(losses, (500, 50))
    with pytest.raises(ValueError, match="0 <= early < late < 1023"):
        in_context_score(losses, (50, 1023))


ROWS = torch.randint(0, 5, (41, 17), generator=torch.Generator().manual_seed(0))


def test_bigrams_are_counted():
    counts = bigram_counts(ROWS, 5)
    for a in range(5):
        for b in range(5):
            expected = sum(int(x == a and y == b) for row in ROWS.tolist() for x, y in itertools.pairwise(row))
            assert counts[a, b] == expected


def test_the_bigram_score_of_the_bigrams_themselves_is_their_entropy():
    counts = bigram_counts(ROWS, 5)
    logits = conditional(counts).log()[ROWS[:, :-1]]
    assert bigram_score(logits, ROWS[:, :-1], counts) == pytest.approx(bigram_entropy(counts), abs=1e-12)
    uniform = torch.zeros(*ROWS[:, :-1].shape, 5)
    assert bigram_score(uniform, ROWS[:, :-1], counts) == pytest.approx(math.log(5), abs=1e-12)
    assert bigram_entropy(counts) < unigram_entropy(counts) < math.log(5)


def test_the_bigram_score_looks_at_the_prediction_not_at_the_text():
    """A model that copies the next token of the text is far from the bigrams."""
    counts = bigram_counts(ROWS, 5)
    cheat = 20 * torch.nn.functional.one_hot(ROWS[:, 1:], 5).float()
    assert bigram_score(cheat, ROWS[:, :-1], counts) > 2 * bigram_entropy(counts)


def test_tokens_that_the_data_never_have_are_left_out():
    counts = bigram_counts(ROWS, 6)  # token 5 never occurs
    tokens = torch.tensor([[0, 5, 1]])
    logits = torch.zeros(1, 3, 6)
    assert bigram_score(logits, tokens, counts) == pytest.approx(math.log(6))


def test_words_are_sorted_by_their_number_of_tokens():
    encode = {" aa": [1, 2], " bb": [3, 4], " c": [5], " ddd": [6, 7, 8]}
    text = "aa bb aa c ddd c c c bb aa 17"
    words = common_words([text], lambda word: encode[word], most=1)
    assert {length: tokens.tolist() for length, tokens in words.items()} == {2: [[1, 2]], 3: [[6, 7, 8]]}


def test_ngram_losses_are_those_of_the_last_token_after_the_beginning():
    words = {2: torch.tensor([[1, 2], [3, 4]]), 3: torch.tensor([[1, 1, 3]])}

    def predict(tokens):
        assert (tokens[:, 0] == 0).all()
        certain = {(0, 1): 2, (0, 3): 4, (0, 1, 1): 2}
        logits = torch.zeros(*tokens.shape, 5)
        for row, key in enumerate(tokens.tolist()):
            logits[row, -1, certain[tuple(key)]] = 50.0
        return logits

    losses = ngram_losses(predict, words, 0)
    assert losses["ngram_loss/2"] == pytest.approx(0, abs=1e-9)
    assert losses["ngram_loss/3"] == pytest.approx(50)  # it is certain of another token


def test_composition_of_matrices_by_hand():
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"blocks.{block}.attn.W_{kind}": torch.randn((3, 5, 11) if kind == "O" else (3, 11, 5), generator=generator)
        for block in range(2)
        for kind in "QKVO"
    }
    found = k_composition(weights)
    for early in range(3):
        for late in range(3):
            written = weights["blocks.0.attn.W_V"][early] @ weights["blocks.0.attn.W_O"][early]
            read = weights["blocks.1.attn.W_Q"][late] @ weights["blocks.1.attn.W_K"][late].T
            expected = (read @ written.T).norm() / (read.norm() * written.norm())
            assert float(found[early, late]) == pytest.approx(float(expected), rel=1e-5)
    assert (found >= 0).all()
    assert (found <= 1).all()
    with pytest.raises(ValueError, match="no block 2"):
        k_composition(weights, 0, 2)
    with pytest.raises(ValueError, match="`early` must be a block before `late`"):
        k_composition(weights, 1, 1)
