"""What the README shows is what works: its Python runs, its files exist. tests/docs looks at its commands."""

import re
from pathlib import Path

import torch

from docs.code_of_pages import blocks_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [block.code for block in blocks_of(README) if block.language == language]


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


def test_it_is_short():
    assert len(README.splitlines()) <= 150
