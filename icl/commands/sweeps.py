"""`icl sweeps`: the sweep files that come with the library, also where it was installed without its repository."""

import sysconfig
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import icl
from icl.config import ConfigError
from icl.config.sweeps import load_sweep
from icl.storage.files import write_atomically

WITHIN = "share/icl/sweeps"
"""Where a wheel puts the files, below the folder of the environment (pyproject.toml)."""


def shipped() -> dict[str, Path]:
    """The sweep files by name, which is the file's name without its ending.

    Raises:
        ConfigError: this installation has none.
    """
    beside = Path(icl.__file__).parents[1]  # the repository, or the folder that holds all installed packages
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = [Path(sysconfig.get_path("data", scheme)) / WITHIN for scheme in schemes]
    for folder in (beside / "sweeps", *installed, beside / WITHIN):
        if (folder / "training-runs").is_dir():  # another package is called sweeps, too
            return {path.stem: path for path in sorted(folder.rglob("*.yaml"), key=lambda path: _order(path, folder))}
    raise ConfigError("this installation has no sweep files; install icl again, from a wheel or from its repository")


def listing(files: Sequence[Path]) -> list[str]:
    """A line for each file: its name, the command that takes it, and what its first comment says it is for."""
    width = max(len(path.stem) for path in files)
    return [f"{path.stem:{width}}  {load_sweep(path).command[-1]:5}  {purpose(path)}" for path in files]


def purpose(path: Path) -> str:
    """The first paragraph of the comment at the top of a sweep file, in one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    return " ".join(lines)


def copy(name: str, folder: Path) -> str:
    """Copy a sweep file into a folder, which is made if needed. Returns the command that runs the copy.

    Raises:
        ConfigError: there is no sweep file of this name, or the folder has a file of this name already.
    """
    files = shipped()
    if name not in files:
        near = get_close_matches(name, files, n=1)
        hint = f"did you mean {near[0]}?" if near else "`icl sweeps list` shows them"
        raise ConfigError(f"there is no sweep file called {name!r}; {hint}")
    target = folder / files[name].name
    if target.exists():
        raise ConfigError(f"{target} exists already; move it away, or choose another folder by --to")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(target, files[name].read_bytes())
    return f"icl {load_sweep(target).command[-1]} {target}"


def _order(path: Path, folder: Path) -> tuple[bool, Path]:
    """Training runs first: the others need them."""
    relative = path.relative_to(folder)
    return relative.parts[0] != "training-runs", relative
