"""Runs as things: shown, compared, exported, renamed, deleted."""

import io
import json
import shutil

import pandas as pd
import pytest
from rich.console import Console

from icl.checkpoints import Checkpoints
from icl.commands.runs import runs_command
from icl.config import ConfigError, TrainingConfig
from icl.estimation import LLCConfig
from icl.execution.llc_run import run_llc
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore, MirroredStore, StorageError
from icl.storage.locks import RunInUseError

TASK = {"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1}
TASK |= {"num_tasks": "inf", "pretrain_seed": None, "true_seed": None, "sampling_seed": None}
SAMPLER = {
    "num_chains": 2,
    "num_draws": 5,
    "epsilon": 1e-5,
    "gamma": 1.0,
    "nbeta": 10.0,
    "init_seed": 0,
    "grad_batch_size": 3,
}


def config_of(lr: float) -> TrainingConfig:
    small = {
        "num_steps": 12,
        "batch_size": 3,
        "eval_batch_size": 7,
        "checkpointer_config": {"checkpoint_steps": [0, 5]},
    }
    return TrainingConfig.parse({"task_config": TASK, "optimizer_config": {"lr": lr}, **small})


SLOW, WILD = config_of(0.001), config_of(90.0)
ESTIMATES = LLCConfig.parse({**SLOW.model_dump(mode="json"), "sampler_config": SAMPLER, "step": 5})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    place = Surroundings.from_environment({"LOCAL_ROOT": str(root), "DEVICE": "cpu"}, tracking="local")
    for config in (SLOW, WILD):
        run_training(config, place)
    run_llc(ESTIMATES, place)
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "root")


def icl_runs(root, action: str | None = None, *names: str, **options) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    environ = {"LOCAL_ROOT": str(root)}
    assert runs_command(False, None, None, None, environ, console, action, names, **options) == 0
    return console.export_text()


def test_the_list_says_what_differs_how_far_they_are_and_which_did_not_learn(root):
    text = icl_runs(root)
    slow, wild = (next(line for line in text.splitlines() if config.name in line) for config in (SLOW, WILD))
    assert "lr 0.001" in slow
    assert "lr 90.0" in wild
    assert "12 of 12" in slow
    assert "(!)" in wild
    assert "did not learn" in icl_runs(root, "show", WILD.name)


def test_a_run_is_shown_with_its_own_settings_and_estimates_and_two_are_compared(root):
    text = icl_runs(root, "show", SLOW.name)
    assert "checkpoints: 0, 5, 11" in text
    assert "task_config.embed_size=4" in text
    assert "betas" not in text
    assert "step 5:" in text
    compared = icl_runs(root, "compare", SLOW.name, WILD.name)
    assert "optimizer_config.lr" in compared
    assert "task_config" not in compared


def test_runs_are_exported_as_tables(root, tmp_path, capsys):
    icl_runs(root, "export", output=tmp_path / "out")
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "out").glob("*.csv")}
    assert set(tables) == {"runs", "metrics", "estimates"}
    assert set(tables["runs"]["optimizer_config.lr"]) == {0.001, 90.0}
    assert set(tables["metrics"]["run"]) == {SLOW.name, WILD.name}
    assert tables["estimates"]["step"].tolist() == [5]
    capsys.readouterr()


def test_a_renamed_run_keeps_its_checkpoints_and_estimates(root):
    icl_runs(root, "rename", SLOW.name, "mine")
    run = Checkpoints(LocalStore(root), "mine")
    assert run.steps() == [0, 5, 11]
    assert json.loads((root / "icl/mine/config.json").read_text())["run_name"] == "mine"
    place = Surroundings.from_environment({"LOCAL_ROOT": str(root), "DEVICE": "cpu"}, tracking="local")
    renamed = SLOW.model_copy(update={"run_name": "mine"})
    assert run_training(renamed, place).finished
    assert "step 5:" in icl_runs(root, "show", "mine")
    for taken in (WILD.name, "a/b"):
        with pytest.raises(ConfigError):
            icl_runs(root, "rename", "mine", taken)


def test_nothing_is_deleted_without_a_yes_nor_while_it_is_written(root, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match="--yes"):
        icl_runs(root, "delete", SLOW.name)
    for answer in ("", "no\n"):  # Ctrl-D, and a no
        monkeypatch.setattr("sys.stdin", typed := io.StringIO(answer))
        monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
        icl_runs(root, "delete", SLOW.name)
    assert (root / "icl" / SLOW.name).is_dir()
    icl_runs(root, "delete", SLOW.name, yes=True)
    assert {path.name for path in (root / "icl").iterdir() if path.is_dir()} == {WILD.name}


@pytest.fixture
def mirrored(root, tmp_path, monkeypatch):
    """The same runs in a folder and in what stands for its bucket; returns the latter."""
    remote = LocalStore(shutil.copytree(root, tmp_path / "bucket"))

    def both(environ):
        return MirroredStore(LocalStore(environ["LOCAL_ROOT"]), remote, first_pause_s=0.01)

    for module in ("commands.runs", "commands.run_things", "execution.opened"):
        monkeypatch.setattr(f"icl.{module}.store_from_environment", both)
    return remote


@pytest.mark.parametrize("here", [True, False])
def test_a_run_is_deleted_in_the_bucket_with_its_estimates(root, mirrored, tmp_path, here, capsys):
    assert any(ESTIMATES.name in key for key in mirrored.list())
    place = root if here else tmp_path / "empty"
    icl_runs(place, "delete", SLOW.name, yes=True)
    assert "and 1 sets of estimates" in capsys.readouterr().out
    for store in (mirrored, LocalStore(place)):
        assert not [key for key in store.list() if SLOW.name in key]
    assert [key for key in mirrored.list() if WILD.name in key]


def test_a_run_that_the_bucket_does_not_delete_is_found_and_deleted_later(root, mirrored, monkeypatch, capsys):
    delete = LocalStore.delete

    def refuse(store, key):
        if store is mirrored and key.endswith("config.json"):
            raise StorageError("no answer")
        delete(store, key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", refuse)
        console = Console(file=io.StringIO())
        environ = {"LOCAL_ROOT": str(root)}
        assert runs_command(False, None, None, None, environ, console, "delete", (SLOW.name,), yes=True) == 1
    told = capsys.readouterr()
    assert "still in the bucket" in told.err
    assert "deleted" not in told.out
    icl_runs(root, "delete", SLOW.name, yes=True)
    assert not [key for key in mirrored.list() if SLOW.name in key]


@pytest.mark.parametrize("here", [True, False])
def test_estimates_are_deleted_by_their_own_name_alone(root, mirrored, tmp_path, here, monkeypatch):
    place = root if here else tmp_path / "empty"
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match=f"icl runs delete {ESTIMATES.name} --yes"):
        icl_runs(place, "delete", ESTIMATES.name)
    icl_runs(place, "delete", ESTIMATES.name, yes=True)
    for store in (mirrored, LocalStore(place)):
        assert not [key for key in store.list() if ESTIMATES.name in key]
    assert Checkpoints(mirrored, SLOW.name).steps() == [0, 5, 11]
    with pytest.raises(ConfigError, match="there is no run 'llc-nothing-01234567'"):
        icl_runs(place, "delete", "llc-nothing-01234567", yes=True)


def test_nothing_is_deleted_nor_renamed_while_its_estimates_are_written(root):
    before = LocalStore(root).list()
    with Checkpoints(LocalStore(root), ESTIMATES.name).lock():
        for action, names, options in (("delete", (SLOW.name,), {"yes": True}), ("rename", (SLOW.name, "mine"), {})):
            with pytest.raises(RunInUseError, match=ESTIMATES.name):
                icl_runs(root, action, *names, **options)
    assert LocalStore(root).list() == before


def test_a_folder_that_cannot_be_deleted_is_told(root, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match=r"cannot delete .*ermission"):
        icl_runs(root, "delete", SLOW.name, yes=True)


def test_a_copy_of_runs_has_their_estimates(root, tmp_path):
    for name, wanted in ((None, {SLOW.name, WILD.name, ESTIMATES.name}), (WILD.name, {WILD.name})):
        target = tmp_path / str(name)
        console = Console(width=250, file=io.StringIO())
        assert runs_command(False, None, (str(root), str(target)), name, {}, console) == 0
        copied = LocalStore(target)
        assert {key.split("/")[1] for key in copied.list()} == wanted
        for folder in wanted:
            keys = LocalStore(root).list(f"icl/{folder}")
            assert {key: copied.get(key) for key in keys} == {key: LocalStore(root).get(key) for key in keys}


def test_a_run_is_exported_from_any_folder_and_from_a_bucket(root, mirrored, tmp_path, capsys):
    icl_runs(tmp_path / "elsewhere", "export", str(root / "icl" / SLOW.name), output=tmp_path / "by-folder")
    assert pd.read_csv(tmp_path / "by-folder" / "estimates.csv")["run"].tolist() == [SLOW.name]
    icl_runs(tmp_path / "elsewhere", "export", str(root / "icl" / SLOW.name))
    assert SLOW.name in capsys.readouterr().out
    for names in ((), (SLOW.name,)):
        icl_runs(tmp_path / "empty", "export", *names, output=tmp_path / "out")
        assert SLOW.name in pd.read_csv(tmp_path / "out" / "runs.csv")["run"].tolist()
        assert "no metrics on this machine" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_listed_shown_and_deleted(root, tmp_path, capsys):
    began = config_of(0.5)
    Checkpoints(LocalStore(root), began.name).save_config(began.model_dump(mode="json"))
    line = next(line for line in icl_runs(root).splitlines() if began.name in line)
    assert "0 of 12" in line
    assert "interrupted" in line
    assert "optimizer_config.lr=0.5" in icl_runs(root, "show", began.name)
    path = root / "icl" / began.name / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.5', '"lr": -1'))  # what no version accepts
    icl_runs(root, "export", output=tmp_path / "out")
    assert f"the settings of {began.name} cannot be read" in capsys.readouterr().err
    icl_runs(root, "delete", began.name, yes=True)
    assert not (root / "icl" / began.name).exists()


@pytest.mark.parametrize(("action", "names"), [("shwo", ()), ("show", ()), ("compare", ("a",)), ("show", ("nothing",))])
def test_wrong_actions_are_refused_in_one_line(root, action, names):
    with pytest.raises(ConfigError):
        icl_runs(root, action, *names)
