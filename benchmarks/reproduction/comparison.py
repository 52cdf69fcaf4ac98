"""One published number beside those of our seeds, and what counts as reproduced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

TOLERANCE, RELATIVE_TOLERANCE = 5.0, 0.15
"""A change of λ̂ is reproduced if it is this close to the published one: the larger of both counts."""

LOG_TOLERANCE = 0.25
"""A step is reproduced if |log(step / published)| is at most this."""


def aim(published: float) -> float:
    """How close to it counts as reproduced, for a change of λ̂."""
    return max(TOLERANCE, RELATIVE_TOLERANCE * abs(published))


HEAD = ("mean", "spread", "in spreads", "p")
"""Of the columns that `Comparison.cells` fills."""


@dataclass(frozen=True)
class Comparison:
    """One number of several independent runs.

    Attributes:
        published: the paper's number, if it gives one.
        values: ours, one per run.
    """

    published: float | None
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Over the runs."""
        return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """The standard deviation over the runs; NaN for fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def least(self) -> float:
        """Of the runs."""
        return min(self.values)

    @property
    def most(self) -> float:
        """Of the runs."""
        return max(self.values)

    @property
    def in_spreads(self) -> float:
        """Mean less published, in units of the spread; NaN without a spread or a published number.

        From three runs on: two would give it by luck.
        """
        if self.published is None or len(self.values) < 3 or self.spread == 0:
            return math.nan
        return (self.mean - self.published) / self.spread

    @property
    def probability(self) -> float:
        """That one more run lies at least as far from the mean of the runs as the published number does.

        |x - m| / (s √(1 + 1/n)) has Student's t with n - 1 degrees of freedom if the n runs are independent, alike and normal.
        """
        score = abs(self.in_spreads) / math.sqrt(1 + 1 / len(self.values))
        return float(2 * student_t.sf(score, len(self.values) - 1))

    def cells(self, decimals: int, sign: str = "") -> list[str]:
        """For the columns `HEAD`; empty where there is no number."""
        shown = [
            (self.mean, f"{sign},.{decimals}f"),
            (self.spread, f",.{decimals}f"),
            (self.in_spreads, "+.1f"),
            (self.probability, ".2f"),
        ]
        return ["" if math.isnan(number) else f"{number:{form}}" for number, form in shown]


@dataclass(frozen=True)
class Change:
    """Of λ̂ over a stage.

    Attributes:
        value: of the change.
        error: its standard error.
        disagree: whether chains disagree at an end of the stage (split R̂), which leaves the error without meaning.
    """

    value: float
    error: float
    disagree: bool = False

    def outcome(self, published: float) -> str:
        """Whether it is reproduced, or missed by more than two standard errors, or neither."""
        if self.disagree:
            return "chains disagree"
        miss = abs(self.value - published)
        if miss - 2 * self.error > aim(published):
            return "outside"
        return "within" if miss + 2 * self.error <= aim(published) else "undecided"

    def __str__(self) -> str:
        return f"{self.value:+.1f} ± {self.error:.1f}"
