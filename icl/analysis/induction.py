"""Scores of the two kinds of attention heads that form an induction circuit.

A previous-token head attends to the token before the query. An induction head attends to the token after an earlier occurrence of
the query's token (prefix matching). Both scores are measured on random tokens, where only the order of tokens can be used (Olsson et
al. 2022, arXiv 2209.11895; arXiv 2402.02364). What the circuit is good for is measured on random tokens that stand twice (repetition gain).

Shapes: S sequences, T tokens, L blocks, H heads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from icl.streams import Stream

Patterns = Callable[[Tensor], Sequence[Tensor]]
"""tokens (S, T) -> attention (S, H, T, T) of each block, queries × keys."""
Losses = Callable[[Tensor], Tensor]
"""tokens (S, T) -> losses (S, T - 1) of the next tokens."""

SAMPLES = 10_000
LENGTHS = (16, 64)
REPEATED_LENGTH = 128
AT_ONCE = 250


@torch.no_grad()
def previous_token_scores(
    patterns: Patterns,
    d_vocab: int,
    begin: int,
    samples: int = SAMPLES,
    lengths: tuple[int, int] = LENGTHS,
    seed: int = 0,
) -> Tensor:
    """Mean attention (L, H) from the last token to the one before it, in random sequences that begin with BOS.

    The length of a sequence is drawn from `lengths`, both ends included.
    """
    stream = Stream(seed, "previous token")
    low, high = lengths
    sizes = low + stream.child("length").integers(0, high - low + 1, (samples,))
    tokens = stream.integers(0, d_vocab, (samples, high))
    tokens[:, 0] = begin
    total: Tensor | None = None
    for size in sizes.unique().tolist():
        for part in tokens[sizes == size][:, :size].split(AT_ONCE):
            scores = torch.stack([pattern[:, :, -1, -2].double().sum(dim=0) for pattern in patterns(part)])
            total = scores if total is None else total + scores
    assert total is not None
    return total / samples


@torch.no_grad()
def prefix_matching_scores(
    patterns: Patterns, d_vocab: int, begin: int, samples: int = SAMPLES, length: int = REPEATED_LENGTH, seed: int = 0
) -> Tensor:
    """Mean attention (L, H) from the second occurrence of a token to the token after its first occurrence.

    Sequences are BOS and random tokens. The repeated token occurs once in the first half, once in the second, and nowhere else.
    """
    stream = Stream(seed, "prefix matching")
    half = length // 2
    tokens = stream.integers(0, d_vocab, (samples, length))
    tokens[:, 0] = begin
    repeated = stream.child("token").integers(0, d_vocab, (samples,))
    first = 1 + stream.child("first").integers(0, half - 2, (samples,))  # so the token after it is not the second one
    second = half + stream.child("second").integers(0, length - half, (samples,))
    everywhere = tokens == repeated[:, None]
    everywhere[:, 0] = False
    tokens[everywhere] = (tokens[everywhere] + 1) % d_vocab
    rows = torch.arange(samples)
    tokens[rows, first] = repeated
    tokens[rows, second] = repeated
    total: Tensor | None = None
    for part, query, key in zip(tokens.split(AT_ONCE), second.split(AT_ONCE), (first + 1).split(AT_ONCE), strict=True):
        own = torch.arange(len(part))
        scores = torch.stack([pattern[own, :, query, key].double().sum(dim=0) for pattern in patterns(part)])
        total = scores if total is None else total + scores
    assert total is not None
    return total / samples


def repeated_rows(
    d_vocab: int, begin: int, samples: int = SAMPLES, length: int = REPEATED_LENGTH, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows (S, 1 + 2N) of BOS, N random tokens and the same N tokens again; and rows in which the first N are in another order.

    N is the largest for which a row has at most `length`.
    """
    stream, count = Stream(seed, "repeated rows"), (length - 1) // 2
    part = stream.integers(0, d_vocab, (samples, count))
    order = stream.child("order").uniform(0, (samples, count)).argsort(dim=1)
    start = torch.full((samples, 1), begin, dtype=part.dtype)
    return torch.cat([start, part, part], dim=1), torch.cat([start, part.gather(1, order), part], dim=1)


@torch.no_grad()
def repetition_gain(
    losses: Losses, d_vocab: int, begin: int, samples: int = SAMPLES, length: int = REPEATED_LENGTH, seed: int = 0
) -> float:
    """Mean loss on random tokens that stand there a second time, less the same after another order of them. **Negative is induction.**

    In nats. The first token of the copy does not count: nothing announces that a copy begins. The two rows that are compared have the
    same tokens, and the same copy at the same place. So a model gains nothing by knowing bigrams, or by favouring what it has read,
    but only by the order in which it has read it.

    Raises:
        ValueError: a row of `length` has no room for two tokens twice.
    """
    if length < 5:
        raise ValueError(f"two tokens that stand twice after BOS need rows of 5 tokens or more, got length {length}")
    same, other = repeated_rows(d_vocab, begin, samples, length, seed)
    count = same.shape[1] // 2
    copied, shuffled = (
        torch.cat([losses(part)[:, count + 1 :] for part in rows.split(AT_ONCE)]).double().mean()
        for rows in (same, other)
    )
    return float(copied - shuffled)
