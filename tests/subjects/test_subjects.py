"""A user's own subject, through the commands as a user starts them."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from icl import cli
from icl.config import ConfigError
from icl.estimation import LLCConfig
from icl.execution.run import is_complete
from icl.execution.surroundings import Surroundings
from icl.sampling import SamplerConfig, estimate_llc
from icl.subjects.digest import DIGEST, weights_digest
from icl.subjects.named import check_subject, make_subject

SAMPLER = {"num_chains": 2, "num_draws": 11, "epsilon": 1e-3, "nbeta": 13.0, "init_seed": 5}


def sweep_of(subject: str = "my_module:MySubject", sampler=(), **settings) -> dict:
    sampler_config = {name: {"value": value} for name, value in {**SAMPLER, **dict(sampler)}.items()}
    parameters = {"subject": {"value": subject}, "sampler_config": {"parameters": sampler_config}}
    if settings:
        own = {name: {"values" if isinstance(value, list) else "value": value} for name, value in settings.items()}
        parameters["subject_config"] = {"parameters": own}
    return {"method": "grid", "command": ["${env}", "icl", "llc"], "parameters": parameters}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the user's module, and storage beside it."""
    shutil.copy(Path(__file__).with_name("my_module.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("LOCAL_ROOT", "checkpoints")
    for name in ("AWS_BUCKET_NAME", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def icl(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Exit status and all that is printed."""
    monkeypatch.setattr("sys.argv", ["icl", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


def test_a_users_class_goes_through_estimate_table_and_figure(folder, monkeypatch, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of(width=[2, 3], seed=1)))
    assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--index", "0", "--tracking", "local")[0] == 0
    assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--index", "1", "--tracking", "local")[0] == 0
    runs = sorted(path.name for path in Path("checkpoints/icl").iterdir())
    assert len(runs) == 2
    assert all(name.startswith("llc-MySubject-") for name in runs)
    config = json.loads(Path("checkpoints/icl", runs[0], "config.json").read_text())
    assert config["subject"] == "my_module:MySubject"
    assert "task_config" not in config
    status, said = icl(monkeypatch, capsys, "llc", "sweep.yaml")
    assert status == 0
    assert said.count("done before") >= 2
    assert icl(monkeypatch, capsys, "tabulate", "sweep.yaml", "--output", "data/mine")[0] == 0
    table = pd.read_csv("data/mine/llc.csv")
    needed = {"step", "subject_config.width", "subject_config.seed", "llc/mean", "llc/mcse", "verdict"}
    assert needed <= set(table.columns)
    assert len(table) == 6
    assert sorted(table["subject_config.width"].unique()) == [2, 3]
    assert "subject" not in table.columns, "what does not vary is no column"
    before = Path("data/mine/llc.csv").read_bytes()
    assert icl(monkeypatch, capsys, "tabulate", "sweep.yaml", "--output", "data/mine")[0] == 0
    assert Path("data/mine/llc.csv").read_bytes() == before
    assert icl(monkeypatch, capsys, "figures", "--jobs", "1")[0] == 0
    drawn = sorted(path.parent.name for path in Path("figures").rglob("loss-and-llc.png"))
    assert drawn == [f"mine-width-{width}" for width in (2, 3)]


def test_the_row_of_a_checkpoint_is_the_estimate_at_its_model(folder, monkeypatch, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of(width=3)))
    assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--tracking", "local")[0] == 0
    rows = [
        json.loads(line)
        for path in Path("checkpoints").rglob("metrics.jsonl")
        for line in path.read_text().splitlines()
    ]
    subject = make_subject("my_module:MySubject", {"width": 3})
    assert [row["step"] for row in rows] == subject.steps() == [0, 7, 20]
    for row in rows:
        step = row["step"]
        result = estimate_llc(subject.model(step), subject.loss, subject.batches(step), SamplerConfig(**SAMPLER))
        assert row["llc/mean"] == result.llc_mean


def test_n_comes_from_the_data_alone_and_in_a_grid(folder, monkeypatch, capsys):
    sweep = sweep_of(sampler={"nbeta": None}, width=[2, 3])
    sweep["parameters"]["step"] = {"value": 20}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--tracking", "local")[0] == 0
    for path in Path("checkpoints").rglob("metrics.jsonl"):
        row = json.loads(path.read_text())
        assert row["wbic/mean"] == pytest.approx(59 * row["loss/mean"])


def test_interrupted_estimates_go_on_and_another_setting_is_another_run(folder, monkeypatch, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of()))
    assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--tracking", "local")[0] == 0
    (path,) = Path("checkpoints").rglob("metrics.jsonl")
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
    assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--tracking", "local")[0] == 0
    assert path.read_bytes() == whole
    names = {
        LLCConfig.parse({"subject": "my_module:MySubject", "subject_config": own, "sampler_config": SAMPLER}).name
        for own in ({}, {"width": 2}, {"width": 3})
    }
    assert len(names) == 3


def retrain(folder: Path, monkeypatch) -> None:
    """The class gives other weights from now on."""
    path = folder / "my_module.py"
    path.write_text(path.read_text().replace("std=0.5", "std=0.45"))
    monkeypatch.delitem(sys.modules, "my_module")


@pytest.mark.parametrize("kept", [1, 3])
def test_changed_weights_are_refused_until_their_estimates_are_deleted(folder, monkeypatch, capsys, kept):
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of()))
    llc = ("llc", "sweep.yaml", "--tracking", "local")
    status, said = icl(monkeypatch, capsys, *llc)
    assert status == 0
    assert "not made again" not in said
    (path,) = Path("checkpoints").rglob("metrics.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    old = path.read_bytes()
    name = path.parent.name
    retrain(folder, monkeypatch)
    status, said = icl(monkeypatch, capsys, *llc)
    assert status == 2
    assert [line for line in said.splitlines() if line.startswith("icl: ")] == [said.strip()]
    assert f"the weights at step 0 are not those that {name} holds the estimate of" in said
    assert path.read_bytes() == old
    words = said.partition("with: icl ")[2].partition(",")[0].split()
    assert words == ["runs", "delete", name]
    assert icl(monkeypatch, capsys, *words, "--yes")[0] == 0
    assert icl(monkeypatch, capsys, *llc)[0] == 0
    assert path.read_bytes().splitlines()[:kept] != old.splitlines()
    assert f"icl: {name}: 3 of 3 estimates exist and are not made again" in icl(monkeypatch, capsys, *llc)[1]


def test_estimates_without_a_digest_are_those_of_an_old_version(folder, monkeypatch, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of()))
    llc = ("llc", "sweep.yaml", "--tracking", "local")
    assert icl(monkeypatch, capsys, *llc)[0] == 0
    (path,) = Path("checkpoints").rglob("metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:2]]
    subject = make_subject("my_module:MySubject", {})
    assert [row.pop(DIGEST) for row in rows] == [weights_digest(subject.model(row["step"])) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    retrain(folder, monkeypatch)
    status, said = icl(monkeypatch, capsys, *llc)
    assert status == 0
    assert "2 of 3 estimates exist and are not made again" in said


def test_a_sweep_does_not_skip_runs_whose_weights_have_changed(folder, monkeypatch, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of(width=[2, 3])))
    for index in ("0", "1"):
        assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--index", index, "--tracking", "local")[0] == 0
    configs = [
        LLCConfig.parse(
            {"subject": "my_module:MySubject", "subject_config": {"width": width}, "sampler_config": SAMPLER}
        )
        for width in (2, 3)
    ]
    place = Surroundings.from_environment(tracking="local")
    assert [is_complete(config, place) for config in configs] == [True, True]
    retrain(folder, monkeypatch)
    assert [is_complete(config, place) for config in configs] == [False, False]


def test_tables_do_not_mix_estimates_of_different_weights(folder, monkeypatch, capsys):
    tabulate = ("tabulate", "sweep.yaml", "--output", "data/mine")
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of()))
    assert icl(monkeypatch, capsys, "llc", "sweep.yaml", "--tracking", "local")[0] == 0
    assert icl(monkeypatch, capsys, *tabulate)[0] == 0
    (old,) = (path.name for path in Path("checkpoints/icl").iterdir())
    written = Path("data/mine/llc.csv").read_bytes()
    retrain(folder, monkeypatch)
    words = ("llc", "sweep.yaml", "--set", "step=7", "--tracking", "local")
    assert icl(monkeypatch, capsys, *words)[0] == 0
    status, said = icl(monkeypatch, capsys, *tabulate)
    assert status == 2
    assert "are estimates of different weights at step 7" in said
    assert icl(monkeypatch, capsys, "runs", "delete", old, "--yes")[0] == 0
    status, said = icl(monkeypatch, capsys, *tabulate)
    assert status == 2
    assert "data/mine/llc.csv has step 7 at other weights than these; move it away" in said
    assert Path("data/mine/llc.csv").read_bytes() == written


def test_the_search_for_constants_takes_any_subject(folder, monkeypatch, capsys):
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of()))
    words = ["--epsilon", "1e-3", "--gamma", "1", "--nbeta", "13", "--chains", "2", "--burn-in", "3", "--draws", "7"]
    status, said = icl(monkeypatch, capsys, "calibrate", "sweep.yaml", "--step", "20", *words)
    assert status == 0
    assert "MySubject" in said
    assert len(pd.read_csv("calibration/calibration.csv")) >= 1
    status, said = icl(monkeypatch, capsys, "calibrate", "sweep.yaml", "--step", "8", *words)
    assert status == 2
    assert "no checkpoint at step 8; the nearest is 7" in said
    table, journal = Path("calibration/calibration.csv"), Path("calibration/cells.jsonl")
    first, cells = table.read_bytes(), journal.read_bytes()
    assert icl(monkeypatch, capsys, "calibrate", "sweep.yaml", "--step", "20", *words)[0] == 0
    assert (table.read_bytes(), journal.read_bytes()) == (first, cells)
    retrain(folder, monkeypatch)
    assert icl(monkeypatch, capsys, "calibrate", "sweep.yaml", "--step", "20", *words)[0] == 0
    assert table.read_bytes() != first
    assert journal.read_bytes().startswith(cells), "the cells of the old weights are not lost"
    assert len(journal.read_bytes().splitlines()) == 2 * len(cells.splitlines()) - 1


WRONG = [
    ("my_modul:MySubject", {}, "there is no module my_modul in "),
    ("my_module:MySubjct", {}, "did you mean my_module:MySubject"),
    ("my_module", {}, "write module:Class, or one of regression"),
    ("my_module:not_a_class", {}, "is a MySubject; it must be a class"),
    ("broken:MySubject", {}, r"importing broken fails: ZeroDivisionError: division by zero \(broken.py:1\)"),
    ("lonely:MySubject", {}, "importing lonely fails: ModuleNotFoundError: No module named 'no_such_package'"),
    ("my_module:WithoutLoss", {}, "WithoutLoss has no method loss; a subject has steps"),
    ("my_module:MySubject", {"widht": 3}, "unknown key 'subject_config.widht': did you mean 'width'"),
    (
        "my_module:WithSettings",
        {"width": 0},
        r"subject_config.width: Input should be greater than or equal to 1 \(got 0\)",
    ),
    ("my_module:WithSettings", {"widht": 3}, "unknown key 'subject_config.widht': did you mean 'width'"),
    ("my_module:NoCheckpoints", {}, r"NoCheckpoints.steps\(\) gives no checkpoints"),
    ("my_module:OddSteps", {}, "must give a list of whole numbers"),
    ("my_module:NoModule", {}, r"NoModule.model\(0\) must give a torch.nn.Module, and gave OrderedDict"),
    ("my_module:Fails", {}, r"Fails.model\(0\) failed: KeyError: 'weights' \(my_module.py:\d+\)"),
    ("my_module:FailsAtBirth", {}, r"FailsAtBirth\(\) failed: FileNotFoundError: runs/7.pt"),
    ("my_module:NotFinite", {}, "the loss of w\\* is not finite"),
    ("my_module:OddShape", {}, "losses for one batch and"),
    ("my_module:NoTensor", {}, "loss_fn returned a float"),
    ("my_module:Elsewhere", {}, "meta"),
    ("my_module:Unreached", {}, "the loss does not reach the parameters spare.weight, spare.bias"),
    ("my_module:Dropping", {}, "call model.eval"),
    ("my_module:Normalising", {}, "call model.eval"),
    ("my_module:NoBatches", {}, "batches is empty"),
    ("my_module:ForgotToReturn", {}, r"ForgotToReturn.batches\(0\) gave nothing"),
    ("my_module:EmptyStream", {}, "batches is empty"),
]


@pytest.mark.parametrize(
    ("subject", "settings", "message"), WRONG, ids=[f"{subject} {own}" for subject, own, _ in WRONG]
)
def test_what_is_wrong_with_a_subject_is_one_line(subject, settings, message, folder, monkeypatch, capsys):
    Path("broken.py").write_text("1 / 0\n")
    Path("lonely.py").write_text("import no_such_package\n")
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep_of(subject, **settings)))
    status, said = icl(monkeypatch, capsys, "llc", "sweep.yaml", "--tracking", "none")
    assert status == 2
    (line,) = [line for line in said.splitlines() if line.startswith("icl: ")]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)
    assert "Traceback" not in said


def test_settings_stand_where_they_belong():
    with pytest.raises(ConfigError, match="num_steps is a setting of the regression run"):
        LLCConfig.parse({"subject": "my_module:MySubject", "num_steps": 3})
    with pytest.raises(ConfigError, match="no subject is named; name it"):
        LLCConfig.parse({"subject_config": {"width": 3}})


def test_a_regression_run_has_the_name_that_it_had():
    config = LLCConfig.parse({"num_steps": 60, "sampler_config": {**SAMPLER, "num_draws": 3}})
    assert (
        config.name
        == LLCConfig.parse(
            {"num_steps": 60, "subject": "regression", "sampler_config": {**SAMPLER, "num_draws": 3}}
        ).name
    )
    old = {key: value for key, value in config.model_dump(mode="json").items() if not key.startswith("subject")}
    assert config.difference(old) == ""


def test_a_pydantic_model_reads_the_settings(folder):
    check_subject("my_module:WithSettings", {"width": 3})
    assert make_subject("my_module:WithSettings", {"width": "3"}).model(0)[0].weight.shape == (3, 5)
    torch.testing.assert_close(
        make_subject("my_module:WithSettings", {"width": 3}).model(7)[0].weight,
        make_subject("my_module:MySubject", {"width": 3}).model(7)[0].weight,
    )
