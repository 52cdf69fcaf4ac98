"""The command line as a user meets it: what it does, and how it refuses."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from icl.checkpoints import Checkpoints
from icl.cli import main
from icl.config import TrainingConfig
from icl.config.sweeps import expand, load_sweep

TRAIN = """\
method: grid
command: ["${env}", "icl", "train"]
parameters:
  task_config:
    parameters:
      task_size: {value: 3}
      max_examples: {value: 5}
      num_tasks: {value: inf}
      embed_size: {value: 14}
      mlp_size: {value: 11}
      num_heads: {value: 2}
      num_layers: {value: 1}
      model_seed: {value: 1}
  num_steps: {value: 12}
  batch_size: {value: 13}
  eval_batch_size: {value: 17}
  checkpointer_config:
    parameters:
      checkpoint_steps: {value: {linear_space: 4}}
"""
LLC = (
    TRAIN.replace('"train"', '"llc"')
    + """\
  sampler_config:
    parameters:
      num_chains: {value: 2}
      num_draws: {value: 3}
      grad_batch_size: {value: 19}
      epsilon: {value: 1e-4}
      gamma: {value: 1.0}
      nbeta: {value: 10.0}
      init_seed: {value: 0}
  checkpoint_idx: {value: -1}
"""
)


@dataclass
class Done:
    """What a call of the command left behind."""

    returncode: int
    stdout: str
    stderr: str


def icl(folder: Path, *words: str, **environment: str) -> Done:
    """The command in this process: a fresh interpreter for each call would take a minute in all."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for key in [key for key in os.environ if key.startswith(("WANDB", "AWS"))]:
            patch.delenv(key)
        patch.setenv("NETRC", str(folder / "no-netrc"))
        for key, value in {"LOCAL_ROOT": str(folder / "checkpoints"), **environment}.items():
            patch.setenv(key, value)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["icl", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with both sweep files and the trained run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "train.yaml").write_text(TRAIN)
    (folder / "llc.yaml").write_text(LLC)
    done = icl(folder, "train", "train.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def name_of(folder: Path, *overrides: str) -> str:
    return TrainingConfig.parse(expand(load_sweep(folder / "train.yaml"), overrides)[0]).name


def assert_refused(done: Done, *mentioned: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("icl: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    for text in mentioned:
        assert text in lines[0]


def test_train_then_llc_then_runs(trained):
    checkpoints = trained / "checkpoints" / "icl" / name_of(trained)
    assert sorted(int(p.stem) for p in checkpoints.glob("[0-9]*.safetensors")) == [0, 4, 8, 11]
    assert json.loads((checkpoints / "config.json").read_text())["task_config"]["model_seed"] == 1
    estimated = icl(trained, "llc", "llc.yaml")
    assert estimated.returncode == 0, estimated.stderr
    (metrics,) = (trained / "checkpoints" / "icl").glob("llc-*/metrics.jsonl")
    row = json.loads(metrics.read_text())
    assert row["step"] == 11
    assert {"llc/mean", "llc/mcse", "llc/rhat", "llc/ess", "verdict"} <= set(row)
    listed = icl(trained, "runs")
    assert listed.returncode == 0
    assert name_of(trained) in listed.stdout.replace("\n", "")


def test_a_second_call_changes_nothing(trained):
    before = {p: p.read_bytes() for p in trained.rglob("*.safetensors")}
    assert icl(trained, "train", "train.yaml").returncode == 0
    assert {p: p.read_bytes() for p in trained.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("setting", "mentioned"),
    [
        ("nonsense=1", ["'nonsense'"]),
        ("task_config.taks_size=3", ["'task_config.taks_size'", "did you mean 'task_size'"]),
        ("num_steps=many", ["num_steps", "'many'"]),
        ("batch_size=-3", ["batch_size", "-3"]),
        ("task_config.num_heads=3", ["num_heads=3", "embed_size=14"]),
        ("task_config.max_examples=0", ["task_config.max_examples", "0"]),
    ],
)
def test_a_wrong_setting_is_refused_by_name(trained, setting, mentioned):
    assert_refused(icl(trained, "train", "train.yaml", "--set", setting), *mentioned)


def test_both_parametrisations_at_once_are_refused(trained):
    assert_refused(
        icl(trained, "llc", "llc.yaml", "--set", "sampler_config.noise_scale=1e-3"), "epsilon", "noise_scale"
    )


def test_files_that_cannot_be_read_are_refused_by_name(trained):
    assert_refused(icl(trained, "train", "absent.yaml"), "absent.yaml")
    (trained / "broken.yaml").write_text("method: grid\nparameters: {a: [1\n")
    assert_refused(icl(trained, "train", "broken.yaml"), "broken.yaml", "line")


def test_an_llc_sweep_without_its_training_run_says_so(trained):
    assert_refused(
        icl(trained, "llc", "llc.yaml", "--set", "task_config.model_seed=5"), "no checkpoints", "train it first"
    )


def test_a_sweep_of_the_other_command_is_named(trained):
    assert_refused(icl(trained, "train", "llc.yaml"), "llc.yaml", "start icl llc llc.yaml")


@pytest.mark.parametrize("text", [b"LOCAL_ROOT=./ck\n# gr\xf6\xdfe\n", b"A=\x00b\n"])
def test_settings_that_are_no_text_are_refused_by_the_name_of_their_file(tmp_path, text):
    (tmp_path / ".env").write_bytes(text)
    assert_refused(icl(tmp_path, "runs"), str(tmp_path / ".env"), "UTF-8")


def test_a_tilde_in_the_root_is_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "train.yaml").write_text(TRAIN)
    done = icl(tmp_path, "train", "train.yaml", LOCAL_ROOT="~/kept", HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "~").exists()
    assert list((tmp_path / "home" / "kept" / "icl").glob("*/finished.json"))
    assert_refused(
        icl(tmp_path, "runs", LOCAL_ROOT="~nobody-of-this-name/kept"), "LOCAL_ROOT=~nobody-of-this-name/kept"
    )


def test_the_numbers_of_the_dry_run_are_those_of_index(tmp_path):
    """`eval_batch_size` decides no weights, so it makes no other run."""
    two = TRAIN.replace("batch_size: {value: 13}", "batch_size: {values: [16, 8]}", 1)
    two = two.replace("eval_batch_size: {value: 17}", "eval_batch_size: {values: [32, 64]}")
    (tmp_path / "two.yaml").write_text(two)
    listed = icl(tmp_path, "train", "two.yaml", "--dry-run")
    assert "4 points describe 2 runs: points that differ only in eval_batch_size are one run" in listed.stderr
    rows = re.findall(r"│ (\d) │ (\S+) ", listed.stdout)
    assert [number for number, _ in rows] == ["0", "1"]
    for number, name in rows:
        done = icl(tmp_path, "train", "two.yaml", "--index", number)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "checkpoints" / "icl" / name / "finished.json").exists()
    assert_refused(icl(tmp_path, "train", "two.yaml", "--index", "2"), "it has 2 runs, numbered from 0 to 1")


def test_an_invalid_point_of_a_sweep_costs_the_others_nothing(tmp_path):
    text = TRAIN.replace("embed_size: {value: 14}", "embed_size: {values: [4, 5, 6]}")
    (tmp_path / "three.yaml").write_text(text)
    for index in ("0", "2"):
        done = icl(tmp_path, "train", "three.yaml", "--index", index)
        assert done.returncode == 0, done.stderr
    widths = {
        json.loads(path.read_text())["task_config"]["embed_size"]
        for path in tmp_path.glob("checkpoints/icl/*/config.json")
    }
    assert widths == {4, 6}
    assert_refused(icl(tmp_path, "train", "three.yaml", "--index", "1"), "num_heads=2 does not divide embed_size=5")
    assert_refused(icl(tmp_path, "train", "three.yaml"), "num_heads=2 does not divide embed_size=5")


def test_a_file_that_ends_too_early_is_not_an_interruption(tmp_path, monkeypatch):
    def fault() -> None:
        raise EOFError("a fault of the library")

    monkeypatch.setattr("icl.commands.presets.print_presets", fault)
    with pytest.raises(EOFError, match="a fault of the library"):
        icl(tmp_path, "presets")


def test_tokens_are_not_for_a_family(trained):
    assert_refused(
        icl(trained, "analyse", "--family", "train.yaml", "--tokens", "x.npy"), "--tokens", "not for --family"
    )


def test_the_id_of_one_wandb_run_does_not_serve_a_grid(trained, monkeypatch):
    from icl.commands import sweep

    seen = []
    monkeypatch.setattr(sweep, "_run", lambda config, place: seen.append(os.environ.get("WANDB_RUN_ID")) or 0)
    monkeypatch.setattr("icl.execution.sweep.run_sweep", lambda *rest: seen.append(os.environ.get("WANDB_RUN_ID")) or 0)
    text = (trained / "train.yaml").read_text().replace("model_seed: {value: 1}", "model_seed: {values: [1, 2, 3]}")
    (trained / "grid.yaml").write_text(text)
    one = icl(trained, "train", "grid.yaml", "--index", "1", WANDB_RUN_ID="x")
    assert "WANDB_RUN_ID" not in one.stderr
    all_of_them = icl(trained, "train", "grid.yaml", WANDB_RUN_ID="x")
    assert seen == ["x", None]
    assert "WANDB_RUN_ID names one W&B run, but grid.yaml has 3" in all_of_them.stderr


def test_unknown_devices_and_commands_are_refused(trained):
    assert_refused(icl(trained, "train", "train.yaml", DEVICE="quantum"), "quantum", "cpu")
    assert_refused(icl(trained, "trian"), "trian")
    assert_refused(icl(trained, "train"), "SWEEP.yaml")


class Bomb:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle"])
def test_a_damaged_checkpoint_is_refused_and_never_run(trained, tmp_path, damage):
    source = trained / "checkpoints" / "icl" / name_of(trained)
    target = tmp_path / "checkpoints" / "icl" / source.name
    target.mkdir(parents=True)
    (tmp_path / "llc.yaml").write_text(LLC)
    whole = (source / "11.safetensors").read_bytes()
    trap = tmp_path / "trap"
    content = {
        "truncated": whole[: len(whole) // 2],
        "foreign": b"not a checkpoint",
        "pickle": pickle.dumps(Bomb(trap)),
    }
    (target / "11.safetensors").write_bytes(content[damage])
    assert_refused(icl(tmp_path, "llc", "llc.yaml"), "11.safetensors")
    assert not trap.exists()


def test_a_checkpoint_of_another_architecture_is_refused(trained, tmp_path):
    from icl.model import parameter_layout
    from icl.storage import LocalStore

    other = TrainingConfig.parse(expand(load_sweep(trained / "train.yaml"), ["task_config.mlp_size=7"])[0])
    layout = {name: size for name, (_, size) in parameter_layout(other.task_config.shape).items()}
    checkpoints = Checkpoints(LocalStore(trained / "checkpoints"), name_of(trained), layout)
    with pytest.raises(ValueError, match="mlp"):
        checkpoints.load(11)


def test_the_installed_command_is_this_one(trained):
    done = subprocess.run([sys.executable, "-m", "icl", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == icl(trained, "--version").stdout


def test_help_teaches_and_version_is_shown(trained):
    done = icl(trained, "--help")
    assert done.returncode == 0
    for command in ("demo", "train", "llc", "analyse", "figures", "runs", "doctor"):
        assert command in done.stdout
    assert icl(trained, "--version").stdout.strip().count(".") == 2


def test_doctor_reports_every_setting(trained):
    done = icl(trained, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("device", "engine", "storage", "W&B"):
        assert word in done.stdout
