"""The runs that a sweep file is about: repeated, referred to, or the training sweep itself."""

import pytest
import yaml

from icl.checkpoints import Checkpoints
from icl.config import ConfigError, TrainingConfig
from icl.config.sweeps import load_sweep
from icl.execution.closing import in_short
from icl.execution.health import remark
from icl.execution.points import choice_overrides, llc_points, says_how_to_sample
from icl.sampling.presets import CALIBRATED, PRESETS
from icl.storage import LocalStore

TASK = {"task_size": 3, "max_examples": 5, "embed_size": 14, "mlp_size": 11, "num_layers": 1, "num_tasks": "inf"}


def sweep_file(folder, name: str, parameters: dict, **others) -> str:
    tree = {key: value if "values" in str(value) else {"value": value} for key, value in parameters.items()}
    path = folder / name
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": tree, **others}))
    return str(path)


@pytest.fixture
def mine(tmp_path) -> str:
    rates = {"parameters": {"lr": {"values": [0.1, 0.02]}}}
    return sweep_file(tmp_path, "mine.yaml", {"task_config": TASK, "num_steps": 70, "optimizer_config": rates})


def runs_of(points) -> list[str]:
    return [point.training.name for point in points]


def test_a_sweep_that_refers_to_another_is_about_the_same_runs_as_that_one(mine, tmp_path):
    direct = llc_points(load_sweep(mine), choice_overrides("calibrated", 3, None, False))
    for reference in (
        {"from": "mine.yaml"},
        {"from": mine},
        "mine.yaml",
        {"from": mine, "preset": "calibrated", "checkpoints": 3},
    ):
        told = {} if "preset" in reference else {"preset": "calibrated", "checkpoints": 3}
        referring = llc_points(load_sweep(sweep_file(tmp_path, "llc.yaml", told, runs=reference)))
        assert referring == [point.model_copy(update={"preset": "calibrated"}) for point in direct]
        assert [point.name for point in referring] == [point.name for point in direct]
    assert {point.training.optimizer_config.lr for point in direct} == {0.1, 0.02}
    assert all(point.sampler_config == CALIBRATED and point.checkpoints == 3 for point in direct)


def test_runs_among_the_parameters_and_a_grid_of_sampler_settings_make_every_pair(mine, tmp_path):
    grid = {"parameters": {"gamma": {"values": [1.0, 2.0, 3.0]}}}
    path = sweep_file(tmp_path, "llc.yaml", {"runs": {"from": mine}, "preset": "calibrated", "sampler_config": grid})
    points = llc_points(load_sweep(path))
    assert len({point.name for point in points}) == len(points) == 6
    assert [point.sampler_config.gamma for point in points] == [1.0, 2.0, 3.0] * 2
    assert len(llc_points(load_sweep(path), ["sampler_config.gamma=5"])) == 2


def test_runs_by_name_have_the_settings_that_are_stored_with_them(mine, tmp_path):
    config = llc_points(load_sweep(mine), ["preset=calibrated"])[1].training.resolved()
    Checkpoints(LocalStore(tmp_path), config.name).save_config(config.model_dump(mode="json"))
    path = sweep_file(tmp_path, "llc.yaml", {"preset": "calibrated"}, runs=[config.name])
    (point,) = llc_points(load_sweep(path), environ={"LOCAL_ROOT": str(tmp_path)})
    assert point.training == config
    absent = sweep_file(tmp_path, "absent.yaml", {"preset": "calibrated"}, runs=[config.name[:-1]])
    with pytest.raises(ConfigError, match=f"did you mean {config.name}"):
        llc_points(load_sweep(absent), environ={"LOCAL_ROOT": str(tmp_path)})


@pytest.mark.parametrize(
    ("runs", "parameters", "mentioned"),
    [
        ({"form": "mine.yaml"}, {}, "runs must be"),
        ([], {}, "runs must be"),
        ({"from": "mine.yaml", "names": ["a"]}, {}, "runs must be"),
        ({"from": "nowhere.yaml"}, {}, "nowhere.yaml"),
        ({"from": "mine.yaml"}, {"num_steps": 5}, "num_steps is a setting of the training runs"),
        ({"from": "mine.yaml"}, {"checkpoints": 2, "step": 5}, "both choose the checkpoints"),
    ],
)
def test_a_wrong_reference_is_refused_in_one_line(mine, tmp_path, runs, parameters, mentioned):
    path = sweep_file(tmp_path, "llc.yaml", parameters, runs=runs)
    with pytest.raises(ConfigError, match=mentioned):
        llc_points(load_sweep(path))


def test_a_training_sweep_says_nothing_of_the_sampler_until_somebody_does(mine, tmp_path):
    assert not says_how_to_sample(load_sweep(mine), ["num_steps=3"])
    assert says_how_to_sample(load_sweep(mine), ["sampler_config.gamma=3"])
    assert says_how_to_sample(load_sweep(mine), choice_overrides("published", None, None, False))
    assert says_how_to_sample(
        load_sweep(sweep_file(tmp_path, "llc.yaml", {"preset": "published"}, runs="mine.yaml")), []
    )


@pytest.mark.parametrize("steps", ["", "a,b", "-3", "1;2"])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ConfigError, match=r"such as 0,100,499"):
        choice_overrides(None, None, steps, False)


def test_the_preset_of_an_option_takes_the_place_of_the_files_preset(mine, tmp_path):
    path = sweep_file(tmp_path, "llc.yaml", {"preset": "published"}, runs={"from": mine})
    for name in PRESETS:
        points = llc_points(load_sweep(path), choice_overrides(name, None, "0,69", True))
        assert all(point.sampler_config == PRESETS[name] and point.steps == (0, 69) for point in points)


def test_a_run_that_did_not_learn_says_so():
    config = TrainingConfig.parse({"task_config": TASK, "num_steps": 70}).resolved()
    assert remark(config, 4.0, 2.0) == ""
    assert "the first loss" in remark(config, 2.0, 2.5)
    assert "predicting zero" not in remark(config, 2.0, 2.5)
    assert "predicting zero" in remark(config, 3_761_365.0, 3_761_365.0)
    assert "3.761e+06" in remark(config, None, 3_761_365.0)
    assert remark(config, 2.0, None) == ""


def test_a_verdict_in_short_has_its_findings_alone():
    verdict = "chains disagree: split R-hat 1.2 is above 1.1 (more draws; more burn-in); not tested: stiff directions (too few)"
    assert in_short(verdict) == "chains disagree; not tested: stiff directions"
    assert in_short("healthy") == "healthy"
