"""Every command in the pages exists, takes the options that it is given, and names files that there are."""

import ast
import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from reader import surroundings
from typer.testing import CliRunner

from docs.code_of_pages import blocks_of
from icl.cli import app
from icl.subjects.language import AttentionOnlyTransformer

ROOT = Path(__file__).parents[2]
PAGES = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "examples/README.md",
            "data/README.md",
            "benchmarks/results/README.md",
        )
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("icl", "python", "make", "pip", "wandb", ".ci/run")
ELSEWHERE = ("git", "cd", "export", "sbatch", "docker")
"""Programs of blocks that are no part of the project."""

NOTHING_SET: dict[str, str | None] = {
    name: None for name in os.environ if name.startswith(("AWS_", "WANDB_", "LOCAL_ROOT", "ICL_"))
}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def lines_of(page: Path) -> Iterator[str]:
    """The commands of a page: the lines of its blocks, and what stands in the text. The log is a history: commands there may be gone."""
    text = page.read_text(encoding="utf-8")
    for block in blocks_of(text):
        if block.language in ("sh", "bash", "console"):
            yield from block.code.replace("\\\n", " ").splitlines()
    if page.name != "log.md":
        without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        yield from re.findall(rf"`((?:{'|'.join(map(re.escape, PROGRAMS))}) [^`]*)`", without_blocks)


def commands_of(page: Path) -> Iterator[list[str]]:
    """Each command as its words, without settings of the environment before it."""
    for line in lines_of(page):
        words: list[str] = []
        # Angle brackets are what a reader fills in; a shell would take them for redirections.
        for word in [*shlex.split(line.replace("<", "").replace(">", ""), comments=True), "&&"]:
            if word in ("&&", "|"):
                if words:
                    yield words
                if "slurm.sh" in words:  # it passes what follows to `icl`
                    yield ["icl", *words[words.index("slurm.sh") + 1 :]]
                words = []
            elif words or not re.match(r"^[A-Z_]+=", word):
                words.append(word)


EVERY = [(page, words) for page in PAGES for words in commands_of(page)]


def chosen(program: str) -> list:
    found = {tuple(words): page for page, words in EVERY if words[0] == program}
    return [
        pytest.param(page, list(words[1:]), id=f"{page.relative_to(ROOT)}: {' '.join(words)}"[:90])
        for words, page in found.items()
    ]


def test_every_block_has_a_known_program():
    assert {words[0] for _, words in EVERY} <= {*PROGRAMS, *ELSEWHERE}


def test_the_pages_have_commands():
    assert len(EVERY) > 80


@pytest.mark.parametrize(("page", "words"), chosen("icl"))
def test_an_icl_command_takes_this(page, words):
    name, *arguments = words
    if not arguments or arguments == ["--help"]:
        assert name in COMMANDS
        return
    arguments = ["0" if word == "SEED" else word for word in arguments]
    context = COMMANDS[name].make_context(name, arguments)  # raises for an option or an argument that does not exist
    for word in arguments:
        if word.startswith("sweeps/"):
            assert (ROOT / word).is_file()
    for setting in context.params.get("settings") or []:
        assert "=" in setting


@pytest.mark.parametrize(
    ("page", "words"), [each for each in chosen("icl") if each.values[1][0] in ("config", "presets", "runs", "doctor")]
)
def test_a_command_that_only_looks_runs(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "s3://" in " ".join(words) or "delete" in words:
        pytest.skip("tests/commands/test_runs.py copies to a bucket, and deletes")
    Path("checkpoints").mkdir()
    done = CliRunner().invoke(app, words, env=NOTHING_SET | {"DEVICE": "cpu"})
    assert done.exit_code == 0, done.output


SMALL = """\
method: grid
parameters:
  task_config: {parameters: {task_size: {value: 2}, max_examples: {value: 3}, num_tasks: {value: 7}, embed_size: {value: 4},
      mlp_size: {value: 5}, num_heads: {value: 2}, num_layers: {value: 1}, model_seed: {value: 1}}}
  num_steps: {value: 20}
  batch_size: {value: 8}
  eval_batch_size: {value: 8}
  checkpointer_config: {parameters: {checkpoint_steps: {value: [0, 1, 2, 3, 5, 8, 13, 19]}}}
"""
OWN_MODEL = """\
method: grid
parameters:
  subject: {value: "quadratic_of_a_reader:Quadratic"}
  preset: {value: calibrated}
"""
FILES = ("SWEEP.yaml", "SWEEP", "FILE", "mine.yaml", "my-sweep.yaml")
FEW = [f"--set=sampler_config.{each}" for each in ("num_draws=12", "num_burnin_steps=2", "grad_batch_size=8")]
DONE_ELSEWHERE = {"figures": "tests/commands/test_journey.py", "runs": "tests/commands/test_runs.py"}
"""Commands that another test runs on a reader's own runs, because they take long or need a bucket."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a small run, its estimates and its tables."""
    folder = tmp_path_factory.mktemp("home")
    for name in FILES:
        (folder / name).write_text(SMALL)
    (folder / "FOLDER").mkdir()
    language = AttentionOnlyTransformer(n_layers=2, d_model=11, n_heads=3, d_head=5, n_ctx=19, d_vocab=17)
    torch.save(language.state_dict(), folder / "FOLDER" / "checkpoint_0000100.pth")
    np.save(folder / "rows.npy", np.random.default_rng(0).integers(0, 17, (29, 19)))
    (folder / "own-model.yaml").write_text(OWN_MODEL)
    (folder / "quadratic_of_a_reader.py").write_text((ROOT / "tests/subjects/quadratic.py").read_text())
    for line in (
        "train SWEEP.yaml",
        "llc SWEEP.yaml",
        "tabulate SWEEP.yaml",
        "analyse RUN --only evals --output data/SWEEP",
    ):
        typed(line.split(), folder)
    return folder


def typed(words: list[str], folder: Path) -> None:
    """A command with what a reader fills in, in a folder; estimates are short. It must succeed."""
    filled = {"NAME": "calibrated", "data/NAME": "data/SWEEP", "my_analysis": "evals"}
    if "RUN" in words:
        filled["RUN"] = min(path.parent.name for path in folder.glob("checkpoints/icl/L*/config.json"))
    if words[0] == "analyse" and "--family" not in words:  # of a sweep, it is for one's own model
        filled["SWEEP.yaml"] = "own-model.yaml"
    short = {
        "llc": [*FEW, *(() if "--preset" in words else ("--preset", "calibrated"))],
        "calibrate": [
            *FEW,
            *["--draws", "10", "--burn-in", "2", "--epsilon", "1e-4", "--gamma", "100", "--nbeta", "10"],
        ],
    }
    words = [*(filled.get(word, word) for word in words), *short.get(words[0], [])]
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, words, env=NOTHING_SET | {"DEVICE": "cpu", "NETRC": str(folder / "none")})
    assert done.exit_code == 0, f"{words}: {done.output} {done.exception}"


def takes_own_runs(words: list[str]) -> bool:
    made = (*FILES, "RUN", "FOLDER", "data/NAME")
    return words[0] not in DONE_ELSEWHERE and any(word in made for word in words[1:])


@pytest.mark.parametrize(("page", "words"), [each for each in chosen("icl") if takes_own_runs(each.values[1])])
def test_a_command_works_on_the_runs_of_a_reader(page, words, home):
    if "ray" in words:
        pytest.skip("tests/execution/test_ray.py")
    typed(words, home)


@pytest.mark.parametrize(("page", "words"), chosen("python"))
def test_a_script_takes_this(page, words):
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
        found = importlib.util.find_spec(name)
        assert found is not None
        origin = found.origin if found.submodule_search_locations is None else f"{name}.__main__"
        path = Path(origin) if origin and Path(origin).is_file() else ROOT.joinpath(*name.split("."), "__main__.py")
    elif words[0] == "examples/NAME.py":
        assert "examples/" in page.read_text() or page.parent.name == "examples"
        return
    else:
        path, arguments = ROOT / words[0], words[1:]
        if any(block.title == words[0] for block in blocks_of(page.read_text())):
            return
    assert path.is_file()
    known = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert {word for word in arguments if word.startswith("--")} <= known


@pytest.mark.parametrize(("page", "words"), chosen("make"))
def test_a_target_exists(page, words):
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(("page", "words"), chosen("pip"))
def test_an_extra_exists(page, words):
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        if found := re.fullmatch(r"icl\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(extras)


@pytest.mark.parametrize(("page", "words"), chosen("wandb"))
def test_a_wandb_command_exists(page, words):
    from wandb.cli.cli import cli

    command = cli.get_command(None, words[0])  # type: ignore[arg-type]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    assert [word for word in words if word.startswith("sweeps/") and not (ROOT / word).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({words[2] for _, words in EVERY if words[:2] == ["python", "-m"]}))
def test_a_module_explains_itself(name):
    done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "words"),
    [
        each
        for each in chosen("icl")
        if each.values[1][0] in ("train", "llc") and str(each.values[1][1:2]).startswith("['sweeps/")
    ],
)
def test_what_it_costs_can_be_asked(page, words, tmp_path):
    if any("FOLDER" in word or "SEED" in word for word in words) or "language" in str(words):
        pytest.skip("it needs what a reader has")
    words = [str(ROOT / word) if word.startswith("sweeps/") else word for word in words]
    environment = surroundings(tmp_path)
    if page.parent.name == "data":  # the page sets it
        environment["LOCAL_ROOT"] = str(ROOT / "data" / "L2H4Minf" / "checkpoints")
    command = [sys.executable, "-m", "icl", *words, "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
