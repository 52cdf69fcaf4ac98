"""Checkpoints of the language model as they are published: in a local folder, or in a repository of the Hugging Face Hub.

A file is `checkpoint_0000100.pth`, the number being the step; `.pt` and `.safetensors` do as well, and so does a run's own
`100.safetensors`. It holds the weights by their public names, either bare or under `model_state_dict`, beside an
`optimizer_state_dict` that is not used. Weights are read as weights only: no code in a file can run.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from icl.checkpoints import CheckpointError, load_plain
from icl.subjects.language import AttentionOnlyTransformer, parameter_sizes, shape_of

_FILE = re.compile(r"(?:checkpoint_)?(\d+)\.(?:pth|pt|safetensors)\Z")
INNER = "checkpoints"
"""The folder of a repository that holds the files."""


class LanguageCheckpoints(Protocol):
    """Where checkpoints are."""

    def steps(self) -> list[int]:
        """The steps that there are, ascending."""
        ...

    def path(self, step: int) -> Path:
        """The file of a step, on this machine."""
        ...


class FolderCheckpoints:
    """The checkpoints of a local folder, or of its folder `checkpoints`, as a cloned repository has it.

    Raises:
        CheckpointError: there is no such folder, it holds no checkpoint, or two of one step.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise CheckpointError(
                f"there is no folder {root}; give the one that holds files such as checkpoint_0000100.pth"
            )
        self._paths = by_step(root.iterdir()) or by_step((root / INNER).glob("*"))
        if not self._paths:
            raise CheckpointError(
                f"{root} holds no checkpoint; its files are called checkpoint_0000100.pth, after their step"
            )

    def steps(self) -> list[int]:
        """The steps that there are, ascending."""
        return sorted(self._paths)

    def path(self, step: int) -> Path:
        """The file of a step.

        Raises:
            CheckpointError: there is none.
        """
        return of_step(self._paths, step)


def load_model(path: str | os.PathLike[str]) -> AttentionOnlyTransformer:
    """The model of a checkpoint file, in single precision.

    Raises:
        CheckpointError: the file is absent, damaged, asks to run code, or holds something else.
    """
    return AttentionOnlyTransformer.from_weights(load_weights(path))


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a checkpoint file by their public names, in single precision; raises like `load_model`."""
    path = Path(path)
    content = _safetensors(path) if path.suffix == ".safetensors" else load_plain(path)
    if isinstance(content, Mapping) and isinstance(content.get("model_state_dict"), Mapping):
        content = content["model_state_dict"]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise CheckpointError(
            f"{path} holds neither weights by name nor a model_state_dict with them; it is no checkpoint of the language model"
        )
    try:
        names = {str(name): value for name, value in content.items()}
        wanted = shape_of(names)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    kept = {name: names[name] for name in parameter_sizes(wanted)}
    for name, value in kept.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {value.dtype}, not weights")
    return {name: value.float() for name, value in kept.items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}; check the path") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({reason}); copy it again") from error


def of_step(found: Mapping[int, Path], step: int) -> Path:
    """The file of a step; raises `CheckpointError` where there is none."""
    if step not in found:
        raise CheckpointError(f"there is no checkpoint of step {step}; there are {_listed(sorted(found))}")
    return found[step]


def by_step(paths: Iterable[Path]) -> dict[int, Path]:
    """Step -> file, of those that are called like checkpoints; raises `CheckpointError` for two of one step."""
    found: dict[int, Path] = {}
    for path in sorted(paths):
        if match := _FILE.match(path.name):
            step = int(match[1])
            if step in found:
                raise CheckpointError(f"{found[step]} and {path} are both of step {step}; keep one of them")
            found[step] = path
    return found


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 6 else f"{len(steps)}, from {steps[0]} to {steps[-1]}"
