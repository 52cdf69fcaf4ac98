"""One's own runs, as a user types it: from a sweep file, through a kill, to a table and a picture."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

import icl
from icl.cli import main
from icl.figures import build

SWEEP = """\
method: grid
command: ["${env}", "icl", "train"]
parameters:
  task_config:
    parameters:
      task_size: {value: 2}
      max_examples: {value: 3}
      num_tasks: {value: inf}
      embed_size: {value: 8}
      mlp_size: {value: 8}
      num_heads: {value: 2}
      num_layers: {value: 1}
      model_seed: {values: [0, 1]}
      pretrain_seed: {value: null}
      true_seed: {value: null}
      sampling_seed: {value: null}
  optimizer_config: {parameters: {lr: {values: [0.003, 0.01]}}}
  num_steps: {value: 150}
  batch_size: {value: 16}
  eval_batch_size: {value: 32}
  checkpointer_config: {parameters: {checkpoint_steps: {value: {log_space: 6}}, state_every: {value: 50}}}
  logger_config: {parameters: {logging_steps: {value: {log_space: 8}}}}
"""
CHEAP = [
    f"sampler_config.{key}={value}"
    for key, value in (("num_draws", 12), ("num_burnin_steps", 2), ("grad_batch_size", 16))
]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "mine.yaml").write_text(SWEEP)
    for key in [key for key in os.environ if key.startswith(("WANDB", "AWS", "ICL_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "checkpoints"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(monkeypatch, line: str, *more: str) -> None:
    """What a user types, in this process; it must succeed."""
    monkeypatch.setattr(sys, "argv", [*line.split(), *more])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def killed_in_the_middle(home: Path) -> None:
    """`icl train mine.yaml`, with all its processes gone as soon as a checkpoint is there."""
    words = [sys.executable, "-m", "icl", "train", "mine.yaml"]
    sweep = subprocess.Popen(
        words, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(home.glob("checkpoints/icl/*/1.safetensors")):
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # Runs are in groups of their own, and end by themselves when their sweep is gone.
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()


def test_from_a_sweep_file_to_a_table_and_a_picture(home, monkeypatch, capsys):
    killed_in_the_middle(home)
    typed(monkeypatch, "icl train mine.yaml")
    runs = icl.open_runs("mine.yaml")
    assert len(runs) == 4
    assert all(run.finished and run.steps[-1] == 149 for run in runs)
    assert set(runs.differing) == {"task_config.model_seed", "optimizer_config.lr"}

    capsys.readouterr()
    settings = [word for text in CHEAP for word in ("--set", text)]
    typed(monkeypatch, "icl llc mine.yaml --preset calibrated --checkpoints 3", *settings)
    closing = capsys.readouterr().out
    assert all(word in closing for word in ("verdict", "0.003", "0.01", "149", "±", runs[0].name))

    typed(monkeypatch, "icl tabulate mine.yaml")
    table = pd.read_csv(home / "data" / "mine" / "llc.csv")
    assert list(table.columns[:3]) == ["model_seed", "optimizer_config.lr", "step"]
    assert table.groupby(["model_seed", "optimizer_config.lr"])["step"].nunique().tolist() == [3] * 4
    pd.testing.assert_series_equal(
        table.sort_values(["model_seed", "optimizer_config.lr", "step"])["llc/mean"],
        runs.estimates.sort_values(["task_config.model_seed", "optimizer_config.lr", "step"])["llc/mean"],
        check_index=False, rtol=1e-6,
    )  # fmt: skip

    typed(monkeypatch, "icl report mine.yaml")
    page = (home / "report.html").read_text()
    assert all(run.name in page for run in runs)
    assert runs.estimates["verdict"].iloc[0].split(":")[0] in page

    drawn: dict[str, Figure] = {}

    def keep(figure: Figure, folder: Path, name: str) -> list[Path]:
        drawn[f"{folder.name}/{name}"] = figure
        return [folder / f"{name}.png"]

    monkeypatch.setattr(build, "save", keep)
    typed(monkeypatch, "icl figures --data data/mine --jobs 1")
    said = capsys.readouterr().err
    assert len(said.splitlines()) <= 2
    family = drawn["mine/loss-and-llc-multiple"]
    assert [text.get_text() for legend in family.legends for text in legend.get_texts()][:2] == ["lr 0.003", "lr 0.01"]
    for figure in drawn.values():
        texts = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert not any(text.startswith("LR") for text in texts)
