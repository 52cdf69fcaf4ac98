"""The section on restricted coefficients says what the tables say."""

from collections.abc import Callable

import pytest

from benchmarks.reproduction import restricted
from benchmarks.reproduction.__main__ import DATA, TEMPLATE
from benchmarks.reproduction.comparison import Change
from benchmarks.reproduction.shipped import Shipped

RISING = ("before first attention", "before first MLP", "before second attention")
STILL = ("second MLP", "unembedding")
FALLING = ("attention, both", "MLPs, both", "both embeddings", "unembedding")


@pytest.fixture(scope="module")
def facts() -> dict:
    return restricted.facts(Shipped.runs(DATA))


def value(facts: dict, setting: str, group: str, stage: str) -> float:
    return float(facts["restricted_at"][setting][group][stage].split(" ± ")[0])


def change(facts: dict, group: str, stage: str) -> Change:
    return facts["restricted_change"]["calibrated"][group][stage]


def clear(change: Change, sign: int) -> bool:
    return sign * change.value > 3 * change.error


CLAIMS: list[tuple[str, Callable[[dict], object]]] = [
    ("Attention carries most of the rise over LR2",
     lambda f: value(f, "calibrated", "attention, both", "LR2") > 0.6 * value(f, "calibrated", "everything", "LR2")
     and float(f["restricted_before"].split()[0]) < 0.1 * value(f, "calibrated", "everything", "LR2")),
    ("nearly all of it in the first block",
     lambda f: value(f, "calibrated", "MLPs, second block", "LR2") < 0.15 * value(f, "calibrated", "MLPs, both", "LR2")),
    ("Over LR3 λ̂ falls in attention, MLPs, embeddings and unembedding",
     lambda f: all(clear(change(f, group, "LR3"), -1) for group in FALLING)),
    ("Over LR3 λ̂ of the layer norms rises", lambda f: clear(change(f, "layer norms, all five", "LR3"), +1)),
    ("It rises in the norms before the first attention, the first MLP and the second attention",
     lambda f: all(clear(change(f, f"layer norms, {norm}", "LR3"), +1) for norm in RISING)),
    ("In the other two the change is within its errors",
     lambda f: not any(clear(change(f, f"layer norms, before {norm}", "LR3"), sign) for norm in STILL for sign in (-1, 1))),
    ("The parts have more than the whole",
     lambda f: all(value(f, "calibrated", "sum of the parts", s) > 1.1 * value(f, "calibrated", "everything", s) for s in ("LR2", "LR3"))),
    ("Few verdicts are healthy",
     lambda f: 2 * f["restricted_failed"]["calibrated"]["decided"] > f["restricted_failed"]["calibrated"]["number"]),
    ("Every estimate fails a test", lambda f: f["restricted_failed"]["published"]["number"] == f["restricted_number"]["published"]),
    ("Attention has most of λ̂ at the end of LR2 here too",
     lambda f: value(f, "published", "attention, both", "LR2") > 0.6 * value(f, "published", "everything", "LR2")),
    ("λ̂ of the layer norms rises over all stages",
     lambda f: all(c.value > 0 for c in f["restricted_change"]["published"]["layer norms, all five"].values())),
]  # fmt: skip
"""Words of the page, and what must hold for them to stand there."""


@pytest.mark.parametrize(("words", "holds"), CLAIMS, ids=[words for words, _ in CLAIMS])
def test_its_conclusions_hold(facts, words, holds):
    assert words in " ".join(TEMPLATE.read_text().split()), "the page does not say this any more"
    assert bool(holds(facts)), "the tables do not bear this out any more"


@pytest.mark.parametrize("setting", restricted.TABLES)
def test_no_group_has_clearly_more_than_everything(facts, setting):
    changes, whole = facts["restricted_at"][setting], facts["restricted_at"][setting]["everything"]
    for group, ends in changes.items():
        for stage, text in ends.items():
            if group != restricted.PARTS and stage in whole:
                (mean, error), (most, other) = (map(float, each.split(" ± ")) for each in (text, whole[stage]))
                assert mean - most < 3 * (error + other)
