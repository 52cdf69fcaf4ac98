"""`icl sweeps`: the shipped sweep files, from the repository and from a wheel."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import version
from pathlib import Path
from shutil import copy2, copytree

import pytest
import typer

import icl
from icl.cli import app
from icl.commands.sweeps import WITHIN, copy, listing, purpose, shipped
from icl.config import ConfigError
from icl.config.sweeps import expand, load_sweep
from icl.native.build import cache_folder

ROOT = Path(__file__).parents[2]


def test_every_sweep_file_of_the_repository_is_shipped_under_a_name_of_its_own():
    files = sorted((ROOT / "sweeps").rglob("*.yaml"))
    assert sorted(shipped().values()) == files
    assert len(listing(files)) == len(files)
    carried = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert sorted(path for [pattern] in carried.values() for path in ROOT.glob(pattern)) == files
    assert {folder: [f"sweeps{folder.removeprefix(WITHIN)}/*.yaml"] for folder in carried} == carried


def test_a_line_says_what_a_file_is_for():
    path = shipped()["quick"]
    assert purpose(path) == "A first look: the paper's transformer on a shortened schedule, two seeds."
    assert listing([path]) == [f"quick  train  {purpose(path)}"]


def test_a_copy_is_the_same_file_and_replaces_none(tmp_path):
    said = copy("quick", tmp_path / "new")
    (made,) = (tmp_path / "new").iterdir()
    assert said == f"icl train {made}"
    assert made.read_bytes() == shipped()["quick"].read_bytes()
    made.write_text("changed")
    with pytest.raises(ConfigError, match="exists already; move it away, or choose another folder by --to"):
        copy("quick", tmp_path / "new")
    assert made.read_text() == "changed"


def test_an_unknown_name_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="no sweep file called 'quick-lc'; did you mean quick-llc"):
        copy("quick-lc", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_of_the_name_sweeps_is_not_taken_for_them(tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    monkeypatch.setattr(icl, "__file__", str(tmp_path / "icl" / "__init__.py"))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "environment"))
    with pytest.raises(ConfigError, match="this installation has no sweep files; install icl again"):
        shipped()
    copytree(ROOT / "sweeps", tmp_path / "environment" / WITHIN)
    assert len(shipped()) == len(list((ROOT / "sweeps").rglob("*.yaml")))


class Installed:
    """An environment with icl from a wheel. It borrows the libraries of this one, but not its icl."""

    def __init__(self, folder: Path) -> None:
        source = folder / "source"
        source.mkdir()
        for name in ("icl", "sweeps"):
            copytree(ROOT / name, source / name, ignore=lambda *_: ["__pycache__"])
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            copy2(ROOT / name, source / name)
        # What builds the wheel is fetched, if it is not here.
        here = ["--no-build-isolation"] if version("setuptools") >= "77" else []
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        self._call([*pip, "wheel", "-q", "--no-deps", *here, "-w", str(folder), str(source)], folder)
        self._call([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], folder)
        self.python = folder / "environment" / "bin" / "python"
        [wheel] = folder.glob("*.whl")
        self._call([*pip, f"--python={self.python}", "install", "-q", "--no-deps", "--no-index", str(wheel)], folder)
        packages = self._call([str(self.python), "-c", "import site; print(site.getsitepackages()[0])"], folder).strip()
        (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.folder = folder / "home"
        self.folder.mkdir()

    def icl(self, line: str) -> str:
        """What a user types; it must succeed."""
        return self._call([str(self.python.with_name("icl")), *line.split()[1:]], self.folder)

    def _call(self, words: list[str], folder: Path) -> str:
        # A home without a key for W&B, but with the kernels that are compiled already.
        cache = {"XDG_CACHE_HOME": str(cache_folder().parent)}
        own = {
            **cache,
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(words, cwd=folder, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def examples(command: str) -> list[str]:
    """The calls that a command's help shows."""
    text = typer.main.get_command(app).commands[command].help  # type: ignore[attr-defined]
    return [" ".join(found.split()) for found in re.findall(r"`(icl [^`]+)`", text.partition("Example")[2])]


MINE = """\
method: grid
command: ["${env}", "icl", "train"]
parameters:
  task_config: {parameters: {task_size: {value: 2}, max_examples: {value: 3}, num_tasks: {value: inf}, embed_size: {value: 8},
      mlp_size: {value: 8}, num_heads: {value: 2}, num_layers: {value: 1}, model_seed: {values: [0, 1]}}}
  num_steps: {value: 500}
  batch_size: {value: 16}
  eval_batch_size: {value: 32}
  checkpointer_config: {parameters: {checkpoint_steps: {value: {linear_space: 500}}}}
"""


@pytest.mark.slow
def test_a_wheel_alone_does_what_its_help_says(installed):
    files = shipped()
    assert len(installed.icl("icl sweeps list").splitlines()) == len(files)
    assert installed.icl("icl sweeps copy quick") == "icl train quick.yaml\n"
    assert (installed.folder / "quick.yaml").read_bytes() == files["quick"].read_bytes()
    assert "2 runs" in installed.icl("icl train quick.yaml --dry-run")

    (installed.folder / "mine.yaml").write_text(MINE)
    assert len(expand(load_sweep(installed.folder / "mine.yaml"))) == 2
    for command in ("train", "llc", "tabulate", "figures", "report"):
        lines = examples(command)
        assert lines
        runs = sorted(path.parent.name for path in installed.folder.glob("checkpoints/icl/L*/config.json"))
        for line in lines:
            for place, name in zip(("RUN1", "RUN2"), runs, strict=False):
                line = line.replace(place, name)
            installed.icl(line)
    assert len(list((installed.folder / "figures").rglob("*.png"))) >= 3
    assert "report: demo/report.html" in installed.icl("icl demo --quick")
    assert {"demo.png", "report.html", "summary.csv"} <= {path.name for path in (installed.folder / "demo").iterdir()}
    assert (installed.folder / "report.html").stat().st_size > 10_000
