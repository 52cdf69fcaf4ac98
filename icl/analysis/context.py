"""The in-context learning score of a language model: the change of its loss along the row.

Shapes: T tokens of a row, so T - 1 losses. Loss i (from 0) is that of token i + 1, predicted from tokens 0..i.
"""

from torch import Tensor

PUBLISHED_PLACES = (50, 500)
"""Early and late position of the in-context score in arXiv 2402.02364, where rows have 1,024 tokens."""
PUBLISHED_LENGTH = 1024


def score_places(length: int) -> tuple[int, int]:
    """Early and late position of the score for rows of `length` tokens: the published 50 and 500 of 1,024, scaled."""
    early, late = (max(1, place * length // PUBLISHED_LENGTH) for place in PUBLISHED_PLACES)
    return early, late


def in_context_score(losses: Tensor, places: tuple[int, int] | None = None, width: float = 0.0) -> float:
    """ℓ_late − ℓ_early for the mean losses (T - 1,) per position. **Negative values mean in-context learning.**

    The score is that of Olsson et al. 2022 and, with the positions 50 and 500, of arXiv 2402.02364.

    Args:
        losses: (T - 1,), the mean loss at each position.
        places: (early, late), indices of losses; None: those of `score_places`.
        width: each place i stands for the mean over places (1 - width) i to (1 + width) i. Single places of few rows are noisy.

    Raises:
        ValueError: the places lie outside the row, or are not in order.
    """
    early, late = places or score_places(len(losses) + 1)
    if places is not None and not 0 <= early < late < len(losses):
        raise ValueError(f"the in-context score needs 0 <= early < late < {len(losses)}, got {early} and {late}")
    late = min(late, len(losses) - 1)
    early = min(early, late)

    def around(place: int) -> Tensor:
        return losses[round((1 - width) * place) : round((1 + width) * place) + 1].mean()

    return float(around(late) - around(early))
