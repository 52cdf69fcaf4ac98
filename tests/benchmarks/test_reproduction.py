"""docs/reproduction.md says what data/ says: written again from the tables, it has the same words and the same numbers."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reproduction import OUTPUT, document
from benchmarks.reproduction.shipped import Change
from benchmarks.reproduction.stages import compared, outcome

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*\.?\d*(?:e[-+]\d+)?")
ROOT = Path(__file__).parents[2]


def test_the_document_is_what_the_data_gives():
    written, given = OUTPUT.read_text(), document()
    assert NUMBER.sub("#", written) == NUMBER.sub("#", given)
    for old, new in zip(NUMBER.findall(written), NUMBER.findall(given), strict=True):
        decimals = len(old.partition(".")[2])
        # One unit of the last digit: another machine sums in another order.
        np.testing.assert_allclose(_value(old), _value(new), atol=1.01 * 10.0**-decimals if decimals else 0)


def test_the_figures_it_names_exist():
    linked = re.findall(r"\]\((\.\./[^)]+)\)", OUTPUT.read_text())
    assert linked
    assert not [link for link in linked if not (OUTPUT.parent / link).exists()]


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def test_seeds_are_compared_by_their_mean_and_spread():
    assert compared(1.0, [2.0, 4.0], 2) == ("+2.00", "1.41")
    assert compared(1.0, [2.0, 3.0, 4.0], 1) == ("+2.0 (+2.0 spreads, p = 0.23)", "1.0")
    assert compared(1.0, [3.0], 1) == ("+2.0", "")
    assert compared(1.0, [3.0, None], 1) == ("+2.0", "")
    assert compared(1.0, [None], 1) == ("", "")
    assert compared(None, [3.0, 4.0], 1) == ("", "")
    assert compared(1.0, [2.0, 3.0, 4.0], 1, independent=False)[0] == "+2.0 (+2.0 spreads)"


@pytest.mark.parametrize(
    ("change", "published", "said"),
    [
        (Change(-11.6, 1.6), -12.3, "within"),
        (Change(-13.5, 4.9), -12.3, "undecided"),
        (Change(-6.4, 3.1), -12.3, "undecided"),
        (Change(-11.3, 11.6), -44.1, "outside"),
        (Change(-40.0, 0.1, disagree=True), -44.1, "chains disagree"),
        (Change(130.0, 0.1), 149.0, "within"),  # 15 % of the larger ones
        (None, 149.0, "not sampled"),
    ],
)
def test_a_change_is_judged_by_its_miss_and_its_error(change, published, said):
    assert outcome(change, published) == said
