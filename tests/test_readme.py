"""What the README shows is what works: its Python runs, its commands parse and name files that exist, its sweep trains."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from icl.cli import app
from icl.config.sweeps import expand, load_sweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    lines = (line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines())
    return [line for line in lines if line]


def icl_commands() -> Iterator[list[str]]:
    inline = re.findall(r"`(icl [^`]*)`", README)
    for line in [*shell_lines(), *inline]:
        for part in line.split("&&"):
            words = shlex.split(part)
            if words and words[0] == "icl":
                yield words[1:]


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


def test_its_commands_exist_and_take_these_options():
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands = list(icl_commands())
    assert {words[0] for words in commands} >= {"train", "llc", "analyse", "figures", "runs", "doctor"}
    for name, *arguments in commands:
        known[name].make_context(name, arguments)  # raises for an option or an argument that does not exist


def test_the_files_it_names_exist():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    named |= set(re.findall(r"(?:sweeps|docs|data|icl|notebooks|benchmarks)/[\w./-]*\w\.\w+", README))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_its_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in set(re.findall(r"\bmake ([\w-]+)", " ".join([*shell_lines(), *re.findall(r"`([^`]*)`", README)]))):
        assert target in targets
