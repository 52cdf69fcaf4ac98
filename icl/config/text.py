"""Reads YAML text into plain values. Every error is one line that names the file and the line."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from icl.config.settings import ConfigError

MAX_BYTES = 1 * 2**20
MAX_DEPTH = 50
MAX_ENTRIES = 1_000_000
"""The most entries of a file, with all aliases expanded: a few lines of nested aliases can mean billions of entries."""

_YAML = "tag:yaml.org,2002:"
_MERGE = f"{_YAML}merge"
_FLOAT = f"{_YAML}float"
_NO_VALUES = ("binary", "omap", "pairs", "set", "value")
"""YAML tags of values that JSON cannot hold. Configurations are stored as JSON with their runs."""

_MEANT = {
    "but found another document": "a second document begins here; keep one in a file",
    "found unhashable key": "a key is a word, not a list or a mapping",
    r"found character '\t' that cannot start any token": "a tab stands where only spaces may; indent with spaces",
}
"""PyYAML's message -> a plainer one."""

# YAML 1.1 needs both the point and the sign, as in 1.0e+3. Here 1e-4 and 1.5e4 are numbers too.
SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")


class Scientific(float):
    """A number written like 1e3. If it is whole, it is accepted as an integer."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, made strict for files of unknown origin.

    A key given twice is an error. Depth and size, with aliases expanded, are checked before any value is made.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._extents: dict[
            int, tuple[int, int]
        ] = {}  # id of a complete node -> its entries and levels, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or is_alias:
            if id(node) not in self._extents:
                raise ComposerError(None, None, "an alias refers to a value that contains it", mark)
            return node
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            self._refuse_repeated_keys(node)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        extents = [self._extents[id(child)] for child in children]
        entries = 1 + sum(entries for entries, _ in extents)
        levels = 1 + max((levels for _, levels in extents), default=0)
        if entries > MAX_ENTRIES or levels > MAX_DEPTH:
            reason = f"more than {MAX_ENTRIES:,} entries" if entries > MAX_ENTRIES else f"more than {MAX_DEPTH} levels"
            raise ComposerError(None, None, f"with its aliases expanded this has {reason}", mark)
        self._extents[id(node)] = entries, levels
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # the constructors of tags raise whatever Python does: ValueError, KeyError, ...
            tag, value = node.tag.rpartition(":")[2], node.value
            shown = f"{_short(repr(value))} is" if isinstance(value, str) else "this is"
            problem = f"{shown} not a valid {tag} ({_short(str(error))}); put text in quotes"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def _refuse_repeated_keys(self, node: yaml.MappingNode) -> None:
        """Refuse keys that are equal, or that become equal as JSON: 1, 1.0, 0x1 and '1' are one key."""
        seen: set[object] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            value = self.construct_object(key)
            if seen & {value, str(value)}:
                raise ComposerError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen |= {value, str(value)}


def _refused_tag(loader: _Loader, node: yaml.Node) -> object:
    tag = node.tag.replace(_YAML, "!!")
    problem = (
        "put '=' in quotes"
        if node.value == "="
        else f"a value of the type {tag} is not allowed; write a number, a text, a list or a mapping"
    )
    raise ConstructorError(None, None, problem, node.start_mark)


def _scientific(loader: _Loader, node: yaml.ScalarNode) -> float:
    if SCIENTIFIC.match(node.value):
        return Scientific(node.value)
    return loader.construct_yaml_float(node)


_Loader.add_implicit_resolver(_FLOAT, SCIENTIFIC, list("-+.0123456789"))
_Loader.add_constructor(_FLOAT, _scientific)
for _tag in (None, *(f"{_YAML}{name}" for name in _NO_VALUES)):
    _Loader.add_constructor(_tag, _refused_tag)  # type: ignore[arg-type]


def read_yaml(path: str | Path, what: str) -> Any:
    """The values of a YAML file. `what` names the kind of file in messages.

    Raises:
        ConfigError: see `parse_yaml`; or the file cannot be read, is not text, or is larger than MAX_BYTES.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"cannot read the {what} {path}: it is larger than {MAX_BYTES // 2**20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"cannot read the {what} {path}, line {line}: it is not UTF-8 text; save it as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The values of a YAML text. No code in it can run.

    Raises:
        ConfigError: the text is not valid. The message is one line with the source and, if known, the line.
    """
    try:
        loader = _Loader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}, line {line}: the character {chr(error.character)!r} is not allowed") from None
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{place}: {_problem(error)}") from None
    except (ValueError, OverflowError):  # raised by the scanner, as for "\U00110000"
        raise ConfigError(f"{source}, line {loader.line + 1}: an escape sequence is not a valid character") from None
    except RecursionError:
        raise ConfigError(f"{source}: its mappings are merged (<<) into one another too deeply") from None
    finally:
        loader.dispose()


def _problem(error: yaml.MarkedYAMLError) -> str:
    said = " ".join(str(error.problem or error.context).split())
    if said == "second occurrence":
        said = str(error.context).partition(";")[0]
    return _MEANT.get(said, said)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
