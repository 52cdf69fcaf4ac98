"""Loss along the row: how much a language model gains from what it has read.

Shapes: T tokens of a row, so T - 1 losses: number i (from 0) is that of token i + 1, predicted from tokens 0..i.
"""

from torch import Tensor

PUBLISHED_PLACES = (50, 500)
"""Early and late token of the in-context score of arXiv 2402.02364, whose rows have 1,024 tokens."""
PUBLISHED_LENGTH = 1024


def score_places(length: int) -> tuple[int, int]:
    """Early and late place of the score for rows of `length` tokens: the published 50 and 500 of 1,024, in proportion."""
    early, late = (max(1, place * length // PUBLISHED_LENGTH) for place in PUBLISHED_PLACES)
    return early, late


def in_context_score(losses: Tensor, places: tuple[int, int] | None = None) -> float:
    """ℓ_late − ℓ_early for mean losses (T - 1,) per position; **negative is in-context learning** (Olsson et al. 2022; arXiv 2402.02364,
    with places 50 and 500).

    Args:
        places: (early, late), numbers of losses; None: those of `score_places`.

    Raises:
        ValueError: places outside the row, or not in order.
    """
    early, late = places or score_places(len(losses) + 1)
    if places is not None and not 0 <= early < late < len(losses):
        raise ValueError(f"the in-context score needs 0 <= early < late < {len(losses)}, got {early} and {late}")
    late = min(late, len(losses) - 1)
    return float(losses[late] - losses[min(early, late)])
