"""The subject that a configuration names, and everything that may be wrong with one that a user wrote."""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn

from icl.checkpoints import CheckpointError
from icl.config import ConfigError
from icl.sampling.objective import Batch, LossFunction
from icl.storage import StorageError
from icl.subjects.subject import Subject

METHODS = ("steps", "model", "loss", "batches")
SHIPPED: Mapping[str, str] = {
    "language": "icl.subjects.language_model:LanguageModel",
    "checkpoints": "icl.subjects.folder:CheckpointFolder",
    "reference": "icl.subjects.reference:ReferenceRun",
}
"""Name -> "module:Class" of the subjects that come with the library, besides the regression run."""


def check_subject(value: str, settings: Mapping[str, Any]) -> None:
    """Refuse what can be refused before anything runs: the class and its settings, without making one.

    Raises:
        ConfigError: one line that says what is wrong and what to do.
    """
    _checked_settings(_class_of(value), settings)


def make_subject(value: str, settings: Mapping[str, Any]) -> Subject:
    """The subject of a name and its settings; what its methods give is checked at every call.

    Args:
        value: "module:Class", looked for from the working directory, or a shipped name.

    Raises:
        ConfigError: see `check_subject`, or making it fails.
    """
    kind = _class_of(value)
    checked = _checked_settings(kind, settings)
    with _explained(f"{kind.__name__}({', '.join(checked)})"):
        subject = kind(**checked)
    _refuse_incomplete(subject, kind.__name__, METHODS)
    return CheckedSubject(subject)


def imported(value: str) -> Any:
    """What "module:name" stands for, looked for from the working directory.

    Raises:
        ConfigError: there is no such module, or nothing of the name in it.
    """
    module_name, colon, name = value.partition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(f"write module:name (got {value!r})")
    found = getattr(_module(module_name), name, None)
    if found is None:
        raise ConfigError(f"{module_name} has no {name}")
    return found


def short_name(value: str) -> str:
    """The name of a subject in names of runs: its class."""
    return re.sub(r"[^A-Za-z0-9_]", "_", value.rpartition(":")[2])


class CheckedSubject:
    """A subject of somebody else's, with everything it returns looked at; a failure inside it is one line that says where."""

    def __init__(self, subject: Any) -> None:
        self._subject = subject
        self._kind = type(subject).__name__
        self.reads_ahead = bool(getattr(subject, "reads_ahead", False))
        self.loss: LossFunction = subject.loss

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._subject, name)

    def steps(self) -> list[int]:
        """The checkpoints there are, ascending."""
        with _explained(f"{self._kind}.steps()"):
            found = self._subject.steps()
        try:
            steps = sorted({_whole(step) for step in found})
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self._kind}.steps() must give a list of whole numbers of at least 0, and gave {_shown(found)}"
            ) from None
        if not steps:
            raise ConfigError(f"{self._kind}.steps() gives no checkpoints; is the path in subject_config right?")
        return steps

    def model(self, step: int) -> nn.Module:
        """The module at a checkpoint."""
        with _explained(f"{self._kind}.model({step})"):
            model = self._subject.model(step)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{self._kind}.model({step}) must give a torch.nn.Module, and gave {_shown(model)}")
        return model

    def batches(self, step: int) -> Callable[..., Batch] | Iterable[Batch]:
        """The data at a checkpoint."""
        with _explained(f"{self._kind}.batches({step})"):
            batches = self._subject.batches(step)
        if batches is None:
            raise ConfigError(
                f"{self._kind}.batches({step}) gave nothing; it must give an iterable of batches, or a function step -> batch"
            )
        return batches


def _class_of(value: str) -> type:
    """The class of a name.

    Raises:
        ConfigError: it cannot be imported, is none, or lacks a method.
    """
    module_name, colon, name = SHIPPED.get(value, value).partition(":")
    if not colon or not module_name or not name.isidentifier():
        known = ", ".join(("regression", *SHIPPED))
        raise ConfigError(f"subject: write module:Class, or one of {known} (got {value!r})")
    kind = getattr(_module(module_name), name, None)
    if kind is None:
        near = get_close_matches(name, dir(_module(module_name)), n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
        raise ConfigError(f"subject: {module_name} has no {name}{hint}")
    if not isinstance(kind, type):
        raise ConfigError(f"subject: {value} is a {type(kind).__name__}; it must be a class")
    # Its loss may be made with it.
    _refuse_incomplete(kind, name, [method for method in METHODS if method != "loss"])
    return kind


def _refuse_incomplete(subject: Any, name: str, methods: Sequence[str]) -> None:
    missing = [method for method in methods if not callable(getattr(subject, method, None))]
    if missing:
        raise ConfigError(
            f"subject: {name} has no method {missing[0]}; a subject has steps(), model(step), loss(predict, batch) and batches(step)"
        )


def _module(name: str) -> Any:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # it stays: the module may import its neighbours later, and worker processes do
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(f"subject: there is no module {error.name} in {folder}, nor is one installed") from None
        raise ConfigError(f"subject: importing {name} fails: {_reason(error)}") from None
    except Exception as error:
        raise ConfigError(f"subject: importing {name} fails: {_reason(error)}") from None


def _checked_settings(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the class is made with: as its pydantic model reads them, if it has one.

    That is the class itself, or its attribute `Settings`.

    Raises:
        ConfigError: a setting is unknown, missing or refused.
    """
    model = kind if issubclass(kind, BaseModel) else getattr(kind, "Settings", None)
    if isinstance(model, type) and issubclass(model, BaseModel):
        _refuse_unknown(settings, list(model.model_fields), model.model_config.get("extra") == "allow", kind.__name__)
        try:
            checked = model.model_validate(dict(settings))
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None
        return dict(settings) if model is kind else {name: getattr(checked, name) for name in model.model_fields}
    try:
        signature = inspect.signature(kind)
    except (TypeError, ValueError):
        return dict(settings)
    named = [
        each for each in signature.parameters.values() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    any_name = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    _refuse_unknown(settings, [each.name for each in named], any_name, kind.__name__)
    needed = [each.name for each in named if each.default is each.empty and each.name not in settings]
    if needed:
        raise ConfigError(f"subject_config.{needed[0]}: {kind.__name__} needs it, and it is not given")
    return dict(settings)


def _refuse_unknown(settings: Mapping[str, Any], known: Sequence[str], any_name: bool, kind: str) -> None:
    unknown = [] if any_name else [name for name in settings if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"{kind} takes {', '.join(known) or 'no settings'}"
        raise ConfigError(f"unknown key 'subject_config.{unknown[0]}': {hint}")


def _one_line(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    key = ".".join(map(str, ("subject_config", *problems[0]["loc"])))
    message = problems[0]["msg"].removeprefix("Value error, ")
    more = f" [and {len(problems) - 1} more]" if len(problems) > 1 else ""
    return f"{key}: {message} (got {_shown(problems[0].get('input'))}){more}"


@contextmanager
def _explained(what: str):
    """Turn whatever a user's code raises into one line that says what was called, what was raised and where."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    except (ConfigError, CheckpointError, StorageError):  # they say it in one line already
        raise
    except Exception as error:
        raise ConfigError(f"{what} failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """As in "KeyError: 'weights' (my_module.py:12)"."""
    text = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "importlib" not in frame.filename]
    place = (
        f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own and Path(own[-1].filename) != Path(__file__) else ""
    )
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _whole(step: Any) -> int:
    if isinstance(step, bool) or int(step) != step or step < 0:
        raise ValueError(step)
    return int(step)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
