"""`icl config`: prints every setting with its type, its default and its meaning."""

import json
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from icl.config import ConfigError, Settings, TrainingConfig
from icl.config.language import LanguageTraining
from icl.estimation import LLCConfig

COMMANDS: Mapping[str, type[Settings]] = {"train": TrainingConfig, "llc": LLCConfig}
ON_REQUEST: Mapping[str, type[Settings]] = {"language": LanguageTraining}
"""Settings of `icl train` for language models. They are printed only if this name is given."""

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Setting(NamedTuple):
    """One setting: its dotted key and its default, in the form `--set key=default`, its type, and its meaning."""

    key: str
    default: str
    type: str
    meaning: str


def config_command(command: str | None, words: Sequence[str], console: Console | None = None) -> None:
    """Print the settings of `icl train`, of `icl llc`, or of both. Outside a terminal, each setting is one line.

    Args:
        command: "train", "llc", or "language" (`icl train` of language models); None: train and llc.
        words: print only settings whose key contains one of these; all by default.

    Raises:
        ConfigError: there is no such command, or no key contains one of the words.
    """
    console = console or Console()
    for setting in chosen_settings(command, words):
        if console.is_terminal:
            console.print(Text.assemble((setting.key, "bold"), " = ", (setting.default, "cyan")))
            meaning = Text.assemble(setting.meaning, (f" ({setting.type})", "dim"))
            console.print(Padding(meaning, (0, 0, 0, 4), expand=False))
        else:
            line = f"{setting.key}={setting.default}  {setting.meaning} ({setting.type})"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def chosen_settings(command: str | None, words: Sequence[str]) -> list[Setting]:
    """The settings that `config_command` prints."""
    named = {**COMMANDS, **ON_REQUEST}
    if command is not None and command not in named:
        raise ConfigError(f"icl config {command}: give a command first, {' or '.join(named)}, then words to search for")
    kinds = COMMANDS.values() if command is None else [named[command]]
    settings = {setting.key: setting for kind in kinds for setting in settings_of(kind)}
    chosen = [each for key, each in settings.items() if not words or any(word in key for word in words)]
    if not chosen:
        raise ConfigError(f"no setting has {' or '.join(words)} in its key; `icl config` prints all settings")
    return chosen


def settings_of(kind: type[Settings], prefix: str = "") -> Iterator[Setting]:
    """All settings of a configuration, in the order of its fields. A nested record is replaced by its own settings."""
    defaults = kind().model_dump(mode="json")
    for name, field in kind.user_fields().items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, Settings):
            yield from settings_of(part, f"{prefix}{name}.")
        else:
            yield Setting(f"{prefix}{name}", _text(defaults[name]), _bounded_type(field), field.description or "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bounded_type(field: FieldInfo) -> str:
    """The type with its bounds, such as "float > 0, < 1 | null"."""
    kind, null, _ = _type(field.annotation).partition(" | null")
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(rule, name)
    ]
    return " ".join([kind, ", ".join(bounds)]).rstrip() + null


def _type(annotation: Any) -> str:
    """A type, in the terms of a sweep file."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(map(_text, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type, inner))
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is not None:
        return "mapping"
    return "null" if annotation is type(None) else annotation.__name__
