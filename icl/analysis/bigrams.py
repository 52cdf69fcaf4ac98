"""How close a language model is to the bigram statistics of its data.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import torch
from torch import Tensor


def bigram_counts(rows: Tensor, d_vocab: int) -> Tensor:
    """Counts (V, V) of how often token b follows token a in rows (B, T)."""
    pairs = rows[:, :-1].flatten() * d_vocab + rows[:, 1:].flatten()
    return torch.bincount(pairs, minlength=d_vocab**2).reshape(d_vocab, d_vocab).double()


def conditional(counts: Tensor) -> Tensor:
    """P(b | a), (V, V). A row without counts is zero."""
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def bigram_entropy(counts: Tensor) -> float:
    """H(b | a) in nats, with the data's own frequencies of a. No bigram score on the data's own tokens is lower."""
    chances = conditional(counts)
    return -float((counts / counts.sum() * chances.clamp(min=1e-300).log()).sum())


def unigram_entropy(counts: Tensor) -> float:
    """H(b) in nats: the loss of predicting every next token by its frequency."""
    chances = counts.sum(dim=0) / counts.sum()
    return -float((chances * chances.clamp(min=1e-300).log()).sum())


def bigram_score(logits: Tensor, tokens: Tensor, counts: Tensor) -> float:
    """Mean cross-entropy −Σ_b P(b | a) log q(b) in nats of a model's predictions q at the tokens a against the bigrams of the data.

    It is that of arXiv 2402.02364. `bigram_entropy` is its minimum on tokens with the same statistics. Tokens a without counts are
    left out.

    Args:
        logits: (B, T, V) at tokens (B, T).
        counts: (V, V), of the data (`bigram_counts`).
    """
    chances = conditional(counts).to(logits.device)
    seen = counts.sum(dim=1).to(logits.device)[tokens] > 0
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, row_logits, row_seen in zip(tokens, logits, seen, strict=True):  # one row at a time, to save memory
        surprise = -(chances[row] * row_logits.double().log_softmax(dim=-1)).sum(dim=-1)
        total += surprise[row_seen].sum()
    return float(total / seen.sum())
