"""docs/reproduction.md says what data/ says: the same words and numbers when written again, no number typed, and every conclusion true."""

import re
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from benchmarks.reproduction import dense
from benchmarks.reproduction.__main__ import DATA, OUTPUT, TEMPLATE, collect, document
from benchmarks.reproduction.comparison import Change, Comparison, aim
from benchmarks.reproduction.shipped import Shipped, detailed

pytestmark = pytest.mark.xdist_group("reproduction")  # the facts are collected once

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*\.?\d*(?:e[-+]\d+)?")
SEEDS = [0, 1, 2, 3, 4]
LATE = ("LR3", "LR4")
RISES_AND_FALLS = {"LR1": 1, "LR2": 1, "LR3": -1, "LR5": 1}

Facts = SimpleNamespace


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return collect(Shipped.runs(DATA))


def test_the_document_is_what_the_data_gives(facts):
    written, given = OUTPUT.read_text(), document(facts)
    assert NUMBER.sub("#", written) == NUMBER.sub("#", given), "make reproduction"
    for old, new in zip(NUMBER.findall(written), NUMBER.findall(given), strict=True):
        decimals = len(old.partition(".")[2])
        # One unit of the last digit: another machine sums in another order.
        np.testing.assert_allclose(_value(old), _value(new), atol=1.01 * 10.0**-decimals if decimals else 0)


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def test_its_numbers_are_filled_in_and_not_typed():
    text = re.sub(r"\{[^}]*\}|\]\([^)]*\)|`[^`]*`|arXiv \d+\.\d+|\d{4}-\d\d-\d\d", "", TEMPLATE.read_text())
    names = (
        r"[Ss]eeds? \d(, \d)*( and \d)?( have| are| has)?", r"LR\d", "predict(s|ing) 0", "Worse than 0", "go to 0",
        "Near 1 the chains", r"K = (8|16)", "90 % interval",
    )  # fmt: skip
    assert not NUMBER.findall(re.sub("|".join(names), "", " ".join(text.split()), flags=re.IGNORECASE))


def test_the_figures_and_sections_it_links_exist():
    text = OUTPUT.read_text()
    linked = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert linked
    assert not [link for link in linked if not (OUTPUT.parent / link).exists()]
    sections = {
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    }
    pages = " ".join(path.read_text() for path in OUTPUT.parent.glob("*.md"))
    links = set(re.findall(r"\]\(#([^)]*)\)", text)) | set(re.findall(r"\]\(reproduction.md#([^)]*)\)", pages))
    assert links
    assert links <= sections


def _near(each: Comparison) -> bool:
    """Whether the mean of our seeds is within the aim of the published Δλ̂."""
    assert each.published is not None
    return abs(each.mean - each.published) < aim(each.published)


def _falls(values: list[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(values))


def _places(f: Facts) -> list[list[float]]:
    """The boundaries of each seed of K = 8."""
    return [each["places"] for each in f.eight["boundaries"]]


def _at(f: Facts, group: str, stage: str) -> float:
    """λ̂ of a group of the model with K = 16."""
    return float(f.sixteen_first["at"][group][stage].split(" ")[0])


def _relative(f: Facts, stage: str) -> float:
    return f.eight["relative"][stage].mean


def _sixteen(f: Facts) -> list[dict]:
    """What each seed of K = 16 shows."""
    return list(f.sixteen.values())


def _calibrated(seed: dict, stage: str) -> float:
    return seed["llc"]["calibrated"][stage][0]


def _in_weights(seed: dict, stage: str) -> float:
    return seed["llc"]["units of the weights"][stage][0]


def _left(seed: dict) -> float:
    """The share of the calibrated fall over LR3 that stays in units of the weights."""
    falls = [value(seed, "LR2") - value(seed, "LR3") for value in (_in_weights, _calibrated)]
    return falls[0] / falls[1]


CLAIMS: list[tuple[str, Callable[[Facts], object]]] = [
    # What reproduced, and what did not.
    ("We trained {num_seeds} models", lambda f: f.num_seeds == len(SEEDS)),
    ("The loss reproduces.", lambda f: all(each.probability > 0.05 for each in [f.end_loss, *f.loss.values()])),
    ("Δλ̂ reproduces over LR1 to LR3, in most seeds", lambda f: all(f.within[stage] > 2.5 for stage in ("LR1", "LR2", "LR3"))),
    ("so Δλ̂ is not judged there", lambda f: all(f.outcomes[stage] == {"chains disagree": SEEDS} for stage in ("LR4", "LR5"))),
    ("The types of LR1 to LR4 reproduce,** in all seeds",
     lambda f: all(f.same_type["llc"][s] == SEEDS for s in ("LR1", "LR2", "LR3", "LR4"))),
    ("The type of LR5 is undecided", lambda f: f.same_type["llc"]["LR5"] == f.other_type["llc"]["LR5"] == []),
    ("The ends of LR1 and LR2 reproduce, in most seeds", lambda f: min(f.boundary_seeds["llc"][stage] for stage in ("LR1", "LR2")) > 2.5),
    ("The last layer norm does so in LR3 and the first one in LR4, in all seeds",
     lambda f: _inside(f, f.last_norm_share, "LR2", "LR3") and _inside(f, f.first_norm_share, "LR3", "LR4")),
    ("The shape of the trajectory reproduces", lambda f: all(abs(each.mean - each.published) < 0.1 for each in f.pc)),
    ("the detector finds neither the end of LR3 nor that of LR4",
     lambda f: max(f.power["level_now"][s] for s in LATE) < 0.1 * f.power_repeats),
    ("The dense grid alone helps little", lambda f: max(f.power["level_dense"][s] for s in LATE) < 0.25 * f.power_repeats),
    ("Smaller errors on the dense grid would help", lambda f: min(f.power["level_best"][s] for s in LATE) > 0.9 * f.power_repeats),
    ("Whether LR3 has an end is not in the published numbers", lambda f: f.power["direct_best"]["LR3"] == 0),
    ("On the dense grid the paper's rule finds more, and more",
     lambda f: f.power["papers_dense"]["others"] > f.power["level_dense"]["others"] + 0.5),
    ("The dense curve has the boundaries of the thinned one, and no more", lambda f: _same(f, "thinned", "all")),
    ("The others alone give them, too", lambda f: _same(f, "thinned", "the others")),
    ("Under the calibrated settings there is no end between",
     lambda f: not any(1.2 * f.dense["all"]["peak_step"] < step < f.dense["all"]["least_step"] / 1.2 for step in _ours(f, "all"))),
    ("The last boundary is the same in every row", lambda f: _spread_of_logs(_last(f)) < 0.15),
    ("so it is chance which rows count as finding that end", lambda f: len(_finding(f, "LR4")) == 2),
    ("With the larger γ the late chains come to rest below the loss of predicting 0",
     lambda f: f.larger_gamma_rest.most < 0.8 * f.zero and f.larger_gamma_disagree <= 0.1 * f.larger_gamma_rest_number),
    ("The chains from the end of LR3 and before climb above it",
     lambda f: all(f.larger_gamma_level[s] > f.zero for s in ("LR1", "LR2", "LR3"))),
    ("None of these estimates is healthy", lambda f: "healthy" not in f.larger_gamma_verdicts),
    ("The published fall over LR4 lies between the two γ",
     lambda f: f.reading["larger"]["all draws"]["LR4"].mean + 5 < f.reading["smaller"]["all draws"]["LR4"].published
     < f.reading["smaller"]["all draws"]["LR4"].mean - 5),
    ("Over the other stages all readings are within the aim,** by their mean or by the one seed there is",
     lambda f: all(_near(each[s]) for gamma in f.reading.values() for each in gamma.values() for s in f.llc if s != "LR4")),
    ("the chains do not stay in the basin", lambda f: min(f.crossed_share) > 0.8),
    ("all of them reach nearly the same loss", lambda f: f.level_range < 0.01 * f.loss_range),
    ("Its size depends on the number of draws", lambda f: abs(f.windows["LR4"][3]) < 0.1 * abs(f.windows["LR4"][0])),
    ("but the standard error of each seed is", lambda f: f.errors["LR5"].least > abs(f.llc["LR5"].mean)),
    ("In these seeds the loss falls less over LR1 too", lambda f: set(np.argsort(f.loss["LR1"].values)[-2:]) == {2, 3}),
    ("Δλ̂ over LR3 in seed 0** is undecided", lambda f: f.outcomes["LR3"]["undecided"] == [0]),
    ("In this seed λ̂ still rises after the published end of LR2", lambda f: f.peak.places[0].low > f.checkpoint["LR2"]),
    ("The detector finds neither in any seed", lambda f: f.boundary_seeds["llc"]["LR3"] == f.boundary_seeds["llc"]["LR4"] == 0),
    ("so this is no evidence", lambda f: f.as_many_chance > 0.05),
    ("By another measure the first layer norm collapses before the last one",
     lambda f: all(first.high <= last.low for first, last in zip(f.first_norm_mean.places, f.last_norm_mean.places, strict=True))),
    ("Ours is at step {closest.first:,}", lambda f: all(place.low > f.end["LR1"] for place in f.closest.places)),
    # The trained models, and when things happen.
    ("The loss at the end is the published one", lambda f: min(f.end_loss.probability, f.low_noise_loss.probability) > 0.05),
    ("its loss differs as much as the model's", lambda f: 0.8 < f.ridge_loss.spread / f.end_loss.spread < 1.25),
    ("In seed 0 it peaks later", lambda f: [p.low <= f.end["LR2"] <= p.high for p in f.peak.places] == [False, True, True, True, True]),
    ("in one seed only,** seed 2", lambda f: _within_heads(f) == [False, False, True, False, False]),
    ("In the others some heads come later, and in seed 1 one comes earlier",
     lambda f: all(p.high > f.published_heads[1] for i, p in enumerate(f.heads.places) if i != 2)
     and [p.low < f.published_heads[0] for p in f.heads.places] == [False, True, False, False, False]),
    # The stages.
    ("LR2 reproduces in all seeds", lambda f: f.outcomes["LR2"] == {"within": SEEDS}),
    ("LR3 reproduces in all seeds but seed 0", lambda f: f.outcomes["LR3"] == {"undecided": [0], "within": [1, 2, 3, 4]}),
    ("LR1 reproduces in seeds 0, 1 and 4", lambda f: f.outcomes["LR1"] == {"within": [0, 1, 4], "outside": [2, 3]}),
    ("obey this identity in LR1 and LR2, and break it from LR3 on",
     lambda f: all((abs(f.implied[s] / f.llc[s].published - 1) < 0.02) == (s in ("LR1", "LR2")) for s in f.llc)),
    ("hardly anything of LR4's fall is left", lambda f: abs(f.windows["LR4"][3]) < 0.1 * abs(f.windows["LR4"][0])),
    ("give the same Δλ̂ up to LR3, and other ones in LR4 and LR5",
     lambda f: all((abs(f.smooth[s].mean - f.llc[s].mean) < 0.2) == (s in ("LR1", "LR2", "LR3")) for s in f.llc)),
    ("Under the calibrated settings it has the published type in all seeds", lambda f: f.same_type["llc_calibrated"]["LR5"] == SEEDS),
    ("seeds 0 and 3 have the published type, seed 2 has the other one",
     lambda f: (f.same_type["llc_calibrated"]["LR4"], f.other_type["llc_calibrated"]["LR4"]) == ([0, 3], [2])),
    # Boundaries and forms.
    ("it finds few published ends",
     lambda f: f.boundaries_within["llc_calibrated"] < f.boundary_chance * f.boundaries_found["llc_calibrated"]),
    ("It finds the end of LR3 in no seed,** under either settings",
     lambda f: all(found["LR3"] == 0 for found in f.boundary_seeds.values())),
    # The chains.
    ("Chains leave early", lambda f: f.half_way_last < 0.05 * f.sgld.num_draws),
    ("Nearly all end up worse than predicting 0", lambda f: f.num_crossed > 0.95 * f.num_chains),
    ("Over LR3 the loss that they reach falls", lambda f: f.late_level["LR3"] < f.late_level["LR2"] - 0.1),
    ("Over LR4 they also climb more slowly", lambda f: f.crossing["LR4"] > 5 * f.crossing["LR3"]),
    ("the climb takes most of the draws, or more than there are",
     lambda f: f.crossing["LR4"] > f.sgld.num_draws / 2 and f.num_crossed < f.num_chains),
    ("### Four times as many draws", lambda f: f.long_factor == 4),
    ("Over LR3 most of the fall stays", lambda f: f.windows["LR3"][3] < 0.7 * f.windows["LR3"][0] < 0),
    ("the chains have ended their climb", lambda f: all(np.ptp(changes[1:]) < 1 for changes in f.windows.values())),
    ("The same is true of calibrated chains",
     lambda f: abs(f.distance_least / f.free_distance - 1) < 0.01
     and abs(f.calibrated_distance_most / f.calibrated_free_distance - 1) < 0.01),
    ("over LR5 the weights grow further, and in most seeds the climb gets no slower",
     lambda f: all(end > start for start, end in f.norm_late) and sum(end <= start for start, end in f.crossing_late) > 2.5),
    # The calibrated settings, and what the curves show.
    ("Calibrated chains stay better than predicting 0, nearly everywhere", lambda f: f.calibrated_above <= 0.05 * f.calibrated_useful),
    ("λ̂ rises over LR1 and LR2, falls over LR3 and rises over LR5,** in all seeds",
     lambda f: all(sign * value > 0 for stage, sign in RISES_AND_FALLS.items() for value in f.calibrated[stage].values)),
    ("Over LR4 it hardly changes", lambda f: max(map(abs, f.calibrated["LR4"].values)) < 0.1 * f.calibrated["LR2"].mean),
    ("In LR1 it starts from negative values", lambda f: max(f.calibrated_start) < 0),
    ("λ̂ peaks earlier than under the published settings", lambda f: f.calibrated_peak_step < f.peak.places[f.seed].low),
    ("the scale cancels, and it changes by only", lambda f: f.trace.most < 25 and max(map(abs, f.scale.values)) < 25),
    # The calibration grids.
    ("Most of these chains are too short", lambda f: f.grid_failed > 0.9 * f.grid_estimates and f.grid_most_draws < 0.1 * f.sgld.num_draws),
    ("in all {scales_all_strongest} with the localisation scale", lambda f: f.scales_lost_strongest == f.scales_all_strongest),
    ("All of them have the localisation scale", lambda f: f.scales_settled > 1 and len(f.scales_settled_at) == 1),
    ("No effect of the size n of the data set is seen",
     lambda f: f.grid["eval_dataset_size"].range < f.grid["eval_dataset_size"].errors.least),
    ("No effect of the batch is seen",
     lambda f: all(f.grid[name].range < 2 * f.grid[name].errors.most for name in ("eval_minibatch", "eval_fixed_batch"))),
    ("Chains driven by the first k tokens may climb higher.** They do at all checkpoints", lambda f: min(f.losses_gaps) > 0),
    ("too little to be sure", lambda f: f.losses_gap < 2 * f.losses_gap_error),
    ("So few checkpoints cannot show it", lambda f: f.grid_seeds["most_errors"] < 2),
    ("From weights that are no minimum λ̂ is negative", lambda f: f.grid["non_minima"].llc.most < 0),
    ("Split R̂ notices nothing", lambda f: f.still_rhat < 1.05 and f.still_spread == len(SEEDS)),
    ("the noise of the batches alone would give", lambda f: f.still_heating.least > 0.8 * f.grid["non_exploration"].llc.least),
    ("The seeds agree with each other", lambda f: all(each["median"] < 0.05 * each["range"] for each in f.apart.values())),
    # K = 16.
    ("We trained seeds 0 and 1", lambda f: list(f.sixteen) == [0, 1]),
    ("The weights grow alike",
     lambda f: all(abs(each["norm"][s] / f.eight["norm"][s].mean - 1) < 0.15 for each in _sixteen(f) for s in f.end)),
    ("the models come nearer and nearer to ridge regression",
     lambda f: all(_falls([each["ridge"][s] for s in f.end]) for each in _sixteen(f))),
    ("λ̂ rises higher", lambda f: min(_calibrated(each, "LR2") for each in _sixteen(f)) > f.eight["llc"]["LR2"].most + 5),
    ("in most seeds of K = 8 at step", lambda f: sum(step == f.eight["peak"] for step in f.eight["peaks"]) > 2.5),
    ("Over LR3 it falls to nearly that of K = 8",
     lambda f: all(abs(_calibrated(each, "LR3") - f.eight["llc"]["LR3"].mean) < 0.1 * _calibrated(each, "LR2") for each in _sixteen(f))),
    ("Seed 1 is outside these ranges both times",
     lambda f: _calibrated(f.sixteen[1], "LR3") > f.eight["llc"]["LR3"].most
     and _calibrated(f.sixteen[1], "LR5") < f.eight["llc"]["LR5"].least),
    ("boundaries in each calibrated curve", lambda f: len({each["boundaries"]["number"] for each in _sixteen(f)}) == 1),
    ("Most seeds of K = 8 have as many", lambda f: sum(len(places) == f.sixteen[0]["boundaries"]["number"] for places in _places(f)) > 2.5),
    ("a quarter of the calibrated fall", lambda f: 0.2 < _left(f.sixteen[0]) < 0.3),
    ("it does not fall, as for K = 8 on average", lambda f: _left(f.sixteen[1]) <= 0 and _relative(f, "LR3") >= _relative(f, "LR2")),
    ("Both have more than K = 8 at every stage end in these units",
     lambda f: all(_in_weights(each, s) > _relative(f, s) + 3 for each in _sixteen(f) for s in ("LR2", "LR3", "LR4", "LR5"))),
    ("The estimates of seed 0 have too few independent draws",
     lambda f: all("too few independent draws" in each for each in f.sixteen_verdicts[0]["units of the weights"])),
    ("at the end of training its chains are too hot", lambda f: "too hot" in f.sixteen_verdicts[0]["units of the weights"][-1]),
    ("Those of seed 1 pass the tests that were made",
     lambda f: all(each.startswith("not tested") for each in f.sixteen_verdicts[1]["units of the weights"])),
    ("They leave the basin at every checkpoint",
     lambda f: all("left the basin" in each or "diverged" in each for each in f.sixteen_verdicts[0]["its own sweep file"])),
    ("at the end of LR2 both diverge", lambda f: np.isnan(f.sixteen[0]["llc"]["its own sweep file"]["LR2"][0])),
    ("only begin the climb of the loss, and every estimate fails a test", lambda f: f.sixteen_first["groups_passed"] == 0),
    ("From there to the end of training λ̂ of the layer norms rises",
     lambda f: _at(f, "layer norms, all five", "LR5") > 2 * _at(f, "layer norms, all five", "LR2")),
    ("That of attention, MLPs and embeddings falls",
     lambda f: all(_at(f, name, "LR5") < 0.5 * _at(f, name, "LR2") for name in ("attention, both", "MLPs, both", "both embeddings"))),
]  # fmt: skip
"""Words of the page, and what must hold for them to stand there."""


@pytest.mark.parametrize(("words", "holds"), CLAIMS, ids=[words for words, _ in CLAIMS])
def test_its_conclusions_hold(facts, words, holds):
    assert words in " ".join(TEMPLATE.read_text().split()), (
        "the page does not say this any more; the claims here follow its words"
    )
    true = bool(holds(SimpleNamespace(**facts)))
    assert true, "the tables do not bear this out any more"


def _ours(f: Facts, curve: str) -> list[float]:
    return f.dense_found[curve]["ours"]


def _finding(f: Facts, stage: str) -> set[bool]:
    """Whether a row finds a published end, over all rows of the dense curve's table."""
    return {stage in ends for rules in f.dense_ends.values() for ends in rules.values()}


def _last(f: Facts) -> list[float]:
    return [steps[-1] for rules in f.dense_found.values() for steps in rules.values()]


def _spread_of_logs(steps: list[float]) -> float:
    return float(np.ptp(np.log(steps)))


def _same(f: Facts, one: str, other: str) -> bool:
    """Whether our detector finds the same boundaries in two curves, up to a tenth."""
    found = [_ours(f, name) for name in (one, other)]
    return len(found[0]) == len(found[1]) and all(abs(np.log(a / b)) < 0.1 for a, b in zip(*found, strict=True))


def _inside(f: Facts, milestone, start: str, end: str) -> bool:
    return all(f.checkpoint[start] <= place.low and place.high <= f.checkpoint[end] for place in milestone.places)


def _within_heads(f: Facts) -> list[bool]:
    return [f.published_heads[0] <= place.low and place.high <= f.published_heads[1] for place in f.heads.places]


def test_the_dense_curve_has_the_boundaries_that_are_stored():
    stored, found = pd.read_csv(dense.RESULTS), dense.boundaries(dense.curves_of(detailed(Shipped.runs(DATA))))
    # Rounding makes another machine draw other curves of the same law.
    pd.testing.assert_frame_equal(stored, found, rtol=0.15)


def test_seeds_are_compared_by_their_mean_and_spread():
    assert Comparison(1.0, [2.0, 4.0]).cells(2) == ["3.00", "1.41", "", ""]
    assert Comparison(1.0, [2.0, 3.0, 4.0]).cells(1, "+") == ["+3.0", "1.0", "+2.0", "0.23"]
    assert Comparison(1.0, [3.0]).cells(1) == ["3.0", "", "", ""]
    assert Comparison(None, [2.0, 3.0, 4.0]).cells(1) == ["3.0", "1.0", "", ""]


@pytest.mark.parametrize(
    ("change", "published", "said"),
    [
        (Change(-11.6, 1.6), -12.3, "within"),
        (Change(-13.5, 4.9), -12.3, "undecided"),
        (Change(-6.4, 3.1), -12.3, "undecided"),
        (Change(-11.3, 11.6), -44.1, "outside"),
        (Change(-40.0, 0.1, disagree=True), -44.1, "chains disagree"),
        (Change(130.0, 0.1), 149.0, "within"),  # 15 % of the larger ones
    ],
)
def test_a_change_is_judged_by_its_miss_and_its_error(change, published, said):
    assert change.outcome(published) == said
