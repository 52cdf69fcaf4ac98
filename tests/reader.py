"""A reader who does what a page says: the files that it shows are written, its commands and its Python are run, in one empty folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from docs.code_of_pages import blocks_of, run

ROOT = Path(__file__).parents[1]
OTHERS = ("WANDB_", "AWS_", "LOCAL_ROOT", "ICL_")


def surroundings(folder: Path) -> dict[str, str]:
    """An environment in which `icl` and `python` are this project's, and nothing else is set up."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    for name, start in (("icl", "-m icl"), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return kept | {"DEVICE": "cpu", "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


def follow(page: Path, folder: Path) -> dict[str, Any]:
    """Do what a page says in a folder, in which the process is, too. Returns the names of its Python at the end."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.title:
            (folder / block.title).write_text(block.code)
        elif block.language == "python":
            run(block.code, names, str(page))
        elif block.language == "sh":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.code],
                cwd=folder,
                env=surroundings(folder),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    return names
