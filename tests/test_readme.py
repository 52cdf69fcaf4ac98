"""What the README shows is what works: its Python runs, its sweep trains, its files exist. tests/docs looks at its commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from docs.code_of_pages import blocks_of
from icl.config.sweeps import expand, load_sweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [block.code for block in blocks_of(README) if block.language == language]


SMALL = ["num_steps=3", "batch_size=2", "eval_batch_size=2", "logger_config.logging_steps={linear_space: 1}"]
SMALL_MODEL = ["task_config.embed_size=4", "task_config.mlp_size=3", "task_config.num_layers=1"]


@pytest.fixture
def my_sweep(tmp_path: Path) -> Path:
    (block,) = blocks("yaml")
    path = tmp_path / "my-sweep.yaml"
    path.write_text(block)
    return path


def test_the_sweep_it_shows_trains(my_sweep):
    assert len(expand(load_sweep(my_sweep))) == 4
    settings = [word for text in SMALL + SMALL_MODEL for word in ("--set", text)]
    words = [sys.executable, "-m", "icl", "train", my_sweep.name, "--index", "1", *settings, "--tracking", "local"]
    done = subprocess.run(words, cwd=my_sweep.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((my_sweep.parent / "checkpoints" / "icl").glob("*-seed1-*/2.safetensors"))) == 1


def test_its_python_runs():
    (block,) = (block for block in blocks("python") if "estimate_llc" in block)
    for number in ("num_draws=500", "num_burnin_steps=500"):
        assert number in block
        block = block.replace(number, number.replace("500", "20"))
    model = torch.nn.Linear(3, 1)
    xs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    names = {
        "model": model,
        "loss": torch.nn.functional.mse_loss,
        "batches": [(xs, model(xs).detach())],
    }
    exec(block, names)
    assert names["result"].loss_trace.shape == (4, 20)  # type: ignore[attr-defined]


def test_the_files_it_names_exist():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    named |= set(re.findall(r"(?:sweeps|docs|data|icl|notebooks|benchmarks)/[\w./-]*\w\.\w+", README))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
