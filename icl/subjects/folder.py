"""A folder of checkpoints, with a module, a loss and data of the user's own."""

import re
from collections.abc import Callable, Iterable, Mapping
from glob import escape, glob
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from icl.checkpoints import CheckpointError
from icl.sampling.objective import Batch
from icl.subjects.named import imported

SUFFIXES = (".safetensors", ".pt", ".pth")


class Settings(BaseModel):
    """What `subject_config` holds."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    path: str = Field(description="a folder of .safetensors, .pt or .pth files, or a pattern such as runs/7/step_*.pt")
    model: str = Field(description="module:name of what makes the nn.Module")
    model_settings: dict[str, Any] = Field(default={}, description="its arguments")
    loss: str = Field(description="module:name of (predict, batch) -> loss, such as icl.evals:cross_entropy_loss")
    batches: str = Field(description="module:name of step -> batches, or of nothing -> batches")
    key: str | None = Field(
        default=None, description="the entry of a .pt file that holds the weights; null: the file itself"
    )


class CheckpointFolder:
    """Checkpoints of one module: `.safetensors`, or weights-only `.pt` and `.pth`, bare or under a named key.

    The step is the last whole number in a file's name, or where that has none in its folder's.
    """

    Settings = Settings
    reads_ahead = True

    def __init__(
        self, path: str, model: str, loss: str, batches: str, model_settings: Mapping[str, Any], key: str | None
    ) -> None:
        self._files = files_by_step(path)
        self._make, self._settings = imported(model), dict(model_settings)
        self.loss: Callable[..., Tensor] = imported(loss)
        self._batches, self._key = imported(batches), key

    def steps(self) -> list[int]:
        """Ascending."""
        return sorted(self._files)

    def model(self, step: int) -> nn.Module:
        """A module of its own with the weights of a checkpoint, in evaluation mode.

        Raises:
            CheckpointError: the file cannot be read, or does not fit the module.
        """
        path = self._files[step]
        model = self._make(**self._settings)
        weights = read_weights(path, self._key)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} does not fit the module: {reason}") from error
        return model.eval()

    def batches(self, step: int) -> Iterable[Batch] | Callable[..., Batch]:
        """The user's data."""
        try:
            return self._batches(step)
        except TypeError:
            return self._batches()


def files_by_step(path: str) -> dict[int, Path]:
    """Step -> file.

    Raises:
        CheckpointError: there is no such file, one has no number in its name, or two have the same.
    """
    folder = Path(path)
    pattern = f"{escape(path)}/*" if folder.is_dir() else path
    files = sorted(Path(name) for name in glob(pattern, recursive=True) if name.endswith(SUFFIXES))
    if not files:
        raise CheckpointError(
            f"there are no checkpoints ({', '.join(SUFFIXES)}) at {path}; the path is looked for from {Path.cwd()}"
        )
    found: dict[int, Path] = {}
    for file in files:
        numbers = re.findall(r"\d+", file.stem) or re.findall(r"\d+", file.parent.name)
        if not numbers:
            raise CheckpointError(f"{file} has no step in its name; name it like step_1000{file.suffix}")
        step = int(numbers[-1])
        if step in found:
            raise CheckpointError(
                f"{found[step]} and {file} both have the step {step}; choose one with a narrower pattern"
            )
        found[step] = file
    return found


def read_weights(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The weights of a file; no code in it can run.

    Args:
        key: the entry that holds them, with dots between nested ones.

    Raises:
        CheckpointError: it cannot be read, or has no such entry.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows as whatever the readers ran into
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is damaged, or holds more than weights and was not loaded: {reason}") from error
    for name in [] if key is None else key.split("."):
        if not isinstance(content, Mapping) or name not in content:
            has = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(f"{path} has no entry {key!r}; it has {has[:200]}")
        content = content[name]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(each, Tensor) for each in content.values())
    ):
        entries = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path} is no mapping of names to tensors; name the entry that holds the weights as key (it has {entries[:200]})"
        )
    return dict(content)
