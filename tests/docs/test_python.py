"""The Python in the pages runs and prints what stands below it; what a guide teaches works from its first block to its last."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from reader import follow, surroundings

from docs.code_of_pages import blocks_of, run, run_page
from icl.config.sweeps import expand, load_sweep

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
QUICK = ("in-context-learning", "learning-coefficient", "nbeta-and-gamma")
SLOW = ("sampling", "verdicts")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
GUIDES = ("docs/own-sweep.md", "docs/own-model.md")
ELSEWHERE = {"README.md", "docs/llc.md", "docs/language.md", "CONTRIBUTING.md"}
"""Their blocks need names: below, and in tests/test_readme.py."""


def test_every_page_with_python_is_run_by_a_test():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("data/*.md"), *DOCS.rglob("*.md")]
    found = {
        str(path.relative_to(ROOT))
        for path in pages
        if any(block.language == "python" for block in blocks_of(path.read_text()))
    }
    assert found == {*(f"docs/concepts/{name}.md" for name in (*QUICK, *SLOW)), *GUIDES, *ELSEWHERE}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_concept_prints_what_the_page_shows(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, outputs = run_page(DOCS / "concepts" / f"{name}.md")
    assert outputs
    for block, printed in outputs:
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", block.code)
        shown, found = ([float(number) for number in NUMBER.findall(text)] for text in (block.code, printed))
        assert found == pytest.approx(
            shown, rel=0.05, abs=0.05
        )  # other processors round otherwise, and chains remember it


SMALL = ["num_steps=3", "batch_size=2", "eval_batch_size=2", "logger_config.logging_steps={linear_space: 1}"]


def test_the_sweep_that_a_reader_writes_trains(tmp_path):
    (block,) = (block for block in blocks_of((DOCS / "own-sweep.md").read_text()) if block.title)
    path = tmp_path / str(block.title)
    path.write_text(block.code)
    assert len(expand(load_sweep(path))) == 4
    words = [
        "icl",
        "train",
        path.name,
        "--index",
        "1",
        "--tracking",
        "local",
        *(word for text in SMALL for word in ("--set", text)),
    ]
    done = subprocess.run(words, cwd=tmp_path, env=surroundings(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "checkpoints" / "icl").glob("*-seed1-*/2.safetensors"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_works(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_ROOT", "AWS_BUCKET_NAME"):
        monkeypatch.delenv(name, raising=False)
    follow(ROOT / page, tmp_path)


@pytest.mark.slow
def test_the_python_of_the_llc_page_runs():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    xs = torch.randn(64, 3)
    batch = (xs, model(xs).detach() + torch.randn(64, 1) / 4)
    names: dict = {}
    run("from icl.sampling import *", names, "llc.md")
    names |= {
        "model": model,
        "loss_fn": lambda predict, batch: (predict(batch[0]) - batch[1]).square().mean(),
        "loader": [batch],
        "batches": [batch],
        "probe_batches": [batch],
        "per_sample_loss": lambda predict, batch: (predict(batch[0]) - batch[1]).square()[:, 0],
    }
    first, second = (block.code for block in blocks_of((DOCS / "llc.md").read_text()) if block.language == "python")
    run(first, names, "llc.md")
    assert names["result"].loss_trace.shape[1] >= 1000
    *code, last = second.rstrip().splitlines()
    assert last.startswith("susceptibility(")  # its three traces are those of tests/sampling/test_linear_response.py
    run("\n".join(code), names, "llc.md")
    assert names["losses"].dims == ("chain", "draw", "sample")


def test_the_python_of_the_language_page_runs(tmp_path, monkeypatch):
    (block,) = (block for block in blocks_of((DOCS / "language.md").read_text()) if block.language == "python")
    from icl.subjects.language import AttentionOnlyTransformer

    monkeypatch.chdir(tmp_path)
    Path("L2W256-3m-rr").mkdir()
    model = AttentionOnlyTransformer(n_layers=2, d_model=8, n_heads=2, d_head=4, n_ctx=7, d_vocab=11)
    torch.save(model.state_dict(), "L2W256-3m-rr/checkpoint_0000100.pth")
    names: dict = {}
    run(block.code, names, "language.md")
    assert names["model"](torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 11)


def test_the_class_of_the_contributors_page_is_one():
    (block,) = (block for block in blocks_of((ROOT / "CONTRIBUTING.md").read_text()) if block.language == "python")
    names: dict = {}
    run(block.code, names, "CONTRIBUTING.md")
    assert isinstance(names["MySubject"], type)
