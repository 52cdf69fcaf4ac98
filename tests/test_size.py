"""A clone stays light: figures and the whole tracked tree keep within their budgets."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURES, TREE = 25e6, 60e6  # bytes


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of a repository")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def test_figures_and_the_tree_keep_within_their_budgets():
    paths = tracked()
    assert size([path for path in paths if path.is_relative_to(ROOT / "figures")]) <= FIGURES
    assert size(paths) <= TREE
