"""The benchmark of verdicts: it runs, goes on where it stopped, and its shares are those of its rows."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from benchmarks.llc.cases import DEFAULT, FIXED, cases, is_sound, relaxation
from benchmarks.llc.honesty import fresh, main, summarise
from benchmarks.llc.loaders import main as loaders
from benchmarks.llc.targets import digits, regression


def test_a_quick_run_makes_tables_and_a_figure_and_is_not_repeated(tmp_path, capsys):
    arguments = ["--quick", "--output", str(tmp_path), "--figures", str(tmp_path)]
    assert main(arguments) == 0
    rows = pd.read_csv(tmp_path / "honesty.csv.gz")
    assert set(rows["kind"]) == {"default", "noise level", "step too long", "box"}
    assert not (rows["wrong"] & rows["healthy"]).any()
    assert rows[rows["sound"]]["healthy"].all()
    assert (tmp_path / "honesty.png").exists()
    made = (tmp_path / "honesty.csv.gz").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0
    assert (tmp_path / "honesty.csv.gz").read_bytes() == made
    assert "s left" not in capsys.readouterr().out


def test_there_are_enough_cases_good_and_bad_and_no_two_are_alike():
    every = cases()
    assert len({case.key for case in every}) == len(every) >= 200
    kinds = pd.Series([case.kind for case in every]).value_counts()
    assert kinds.min() >= 5
    assert len(kinds) == 15


def test_shares():
    rows = pd.DataFrame({
        "kind": "box", "family": "regular", "sound": [True, True, True, False], "wrong": [False, False, True, True],
        "healthy": [True, False, False, True], "within_10_percent": [True, True, False, False],
        "verdict": ["healthy", "not tested: error (too few draws)", "too hot; not tested: error (too few draws)", "healthy"],
    })  # fmt: skip
    row = summarise(rows).iloc[0]
    assert (row["cases"], row["sound"]) == (4, 3)
    assert row["wrong_and_healthy"] == 0.25
    assert row["sound_healthy_within_10_percent"] == pytest.approx(1 / 3)
    assert (row["false_alarms"], row["undecided"]) == (0.0, 0.5)
    alarm = rows.assign(verdict=["healthy", "still rising: more burn-in", "too hot", "healthy"])
    assert summarise(alarm).iloc[0]["false_alarms"] == 0.5


def test_fresh_seeds_are_of_the_default_settings_and_of_no_other_case():
    known = {case.key for case in cases()}
    found = fresh(2)
    assert not known & {case.key for case in found}
    assert {case.kind for case in found} == {"default", "default, mini-batches"}
    assert len({case.key for case in found}) == len(found) > 60


def test_a_budget_is_sound_if_chains_forget_their_start_in_the_softest_direction():
    config = FIXED.model_copy(update={"epsilon": 0.01})
    assert relaxation(config, 2.0) == pytest.approx(100.0)
    case = next(case for case in cases() if case.kind == "short step")
    target, spread = regression("small", 1000, 10), regression("spread", 1000, 10, 1000.0)
    assert is_sound(case, config.model_copy(update={"epsilon": 1e-3}), target)
    assert not is_sound(case, config.model_copy(update={"epsilon": 1e-3}), spread)
    assert not is_sound(case, config.model_copy(update={"epsilon": 1e-3, "num_draws": 30}), target)
    assert not is_sound(replace(case, kind="box"), config.model_copy(update={"epsilon": 1e-3}), target)
    critical = DEFAULT.model_copy(update={"sampling_method": "langevin", "epsilon": 0.01, "gamma": 1.0})
    assert relaxation(critical, 1.0) == pytest.approx(10.0)
    assert relaxation(critical.model_copy(update={"friction": 100.0}), 1.0) == pytest.approx(1000.0, rel=0.01)


def test_values_at_a_minimum():
    target = regression("test", 1000, 4, 10.0, flat=3)
    nbeta = 1000 / math.log(1000)
    assert target.exact is not None
    assert 1.9 < target.exact(nbeta, 0.1) < 2.0
    for each in (target, digits(200)):
        objective = each.at(0.0)
        _, gradient = objective.losses_and_gradients(objective.anchor[None], each.data, None)
        assert float(gradient.norm()) < 1e-2
        loss, moved = (objective.losses(each.at(off).anchor[None], each.data) for off in (0.0, 0.1))
        assert float(moved - loss) > 0
    assert torch.equal(torch.cat([part[0] for part in target.batches(300)]), target.data[0])


def test_the_benchmark_of_loaders_runs_and_goes_on_where_it_stopped(tmp_path, capsys):
    assert loaders(["--quick", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "loaders.csv")
    assert rows["batch"].tolist() == [1000, 16]
    assert (rows["gamma"] == 1.0).all()
    right = (rows["estimate"] - rows["reference"]).abs() <= 0.1 * rows["reference"] + 2 * rows["mcse"]
    assert (right | ~rows["healthy"]).all()
    made = (tmp_path / "loaders.csv").read_bytes()
    assert loaders(["--quick", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "loaders.csv").read_bytes() == made
