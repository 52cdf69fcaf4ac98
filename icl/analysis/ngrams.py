"""The n-gram loss: how well a language model completes words that its tokenizer cuts into several tokens.

Shapes: W words, n tokens of a word, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

LENGTHS = (2, 3, 4)
WORDS = 100
"""The number of most common words of each length that are used."""


def common_words(
    documents: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    lengths: Sequence[int] = LENGTHS,
    most: int = WORDS,
) -> dict[int, Tensor]:
    """n -> (W, n) tokens of the most common words that are cut into n tokens. A word includes the space before it."""
    counts = Counter(word for document in documents for word in document.split() if word.isalpha())
    found: dict[int, list[Sequence[int]]] = {length: [] for length in lengths}
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        tokens = encode(f" {word}")
        if len(tokens) in found and len(found[len(tokens)]) < most:
            found[len(tokens)].append(tokens)
        if all(len(words) >= most for words in found.values()):
            break
    return {length: torch.tensor(words) for length, words in found.items() if words}


@torch.no_grad()
def ngram_losses(predict: Callable[[Tensor], Tensor], words: Mapping[int, Tensor], begin: int) -> dict[str, float]:
    """`ngram_loss/n`: mean loss in nats on the last token of words of n tokens. Each word is one row after BOS (arXiv 2402.02364).

    Args:
        predict: tokens (W, n) -> logits (W, n, V).
        words: n -> (W, n) (`common_words`).
        begin: the token BOS.
    """
    losses = {}
    for length, tokens in words.items():
        rows = torch.cat([torch.full((len(tokens), 1), begin), tokens[:, :-1]], dim=1)
        logits = predict(rows)[:, -1].double()
        losses[f"ngram_loss/{length}"] = float(
            torch.nn.functional.cross_entropy(logits, tokens[:, -1].to(logits.device))
        )
    return losses
