"""Sweep files: a W&B sweep YAML in, the plain configurations of its runs out.

The same file serves `wandb sweep` with agents and a run on this machine with no account. The grid is therefore expanded
by the engine that the hosted service uses (the `sweeps` package), so that both see the same runs in the same order.
Nothing here knows what a configuration means: `icl.config.training` turns the plain dictionaries into typed records.
"""

import json
import random
import re
import sys
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml

from icl.config.settings import ConfigError

Config = dict[str, Any]
ConfigT = TypeVar("ConfigT")

_SWEEP_KEYS = (
    *("command", "controller", "description", "early_terminate", "entity", "imageuri", "job", "method", "metric"),
    *("name", "parameters", "program", "project", "run_cap"),
)
_PARAMETER_KEYS = (
    *("a", "b", "distribution", "max", "min", "mu", "parameters", "probabilities", "q", "sigma", "value", "values"),
)
# YAML 1.1 reads 1e-4 and 1.5e4 as text, as it wants both the point and the sign; whoever writes them means numbers.
_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked for form only: `parameters` is W&B's tree of `value`, `values`, ranges and `parameters`."""

    source: str
    """The file's name as the user gave it, for messages."""
    method: str
    """`grid` or `random`."""
    parameters: Mapping[str, Any]
    command: tuple[str, ...] = ()
    name: str | None = None
    project: str | None = None
    entity: str | None = None
    run_cap: int | None = None
    """The most runs that this sweep may have; a random sweep needs one."""


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key != "<<":
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file without running anything of it.

    Raises:
        ConfigError: one line naming the file, and the line or the dotted key: no such file, broken YAML, a key given
            twice, an unknown key.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"cannot read the sweep file {source}: {reason}") from None
    data = _parse_yaml(text, source)
    if not isinstance(data, dict) or "parameters" not in data:
        raise ConfigError(f"{source}: a sweep file is a mapping with the keys 'method' and 'parameters'")
    for key in data:
        if key not in _SWEEP_KEYS:
            raise ConfigError(f"{source}: unknown key {key!r}: {_nearest(key, _SWEEP_KEYS)}")
    method = data.get("method")
    if method not in ("grid", "random"):
        raise ConfigError(f"{source}: method {method!r} is not one that runs offline; use 'grid' or 'random'")
    run_cap = data.get("run_cap")
    if run_cap is not None and (type(run_cap) is not int or run_cap < 1):
        raise ConfigError(f"{source}: run_cap must be a whole number above zero (got {run_cap!r})")
    command = data.get("command") or []
    if not isinstance(command, list):
        raise ConfigError(f"{source}: command must be a list of words (got {command!r})")
    _check_parameters(data["parameters"], "parameters", source)
    return Sweep(
        source,
        method,
        data["parameters"],
        tuple(map(str, command)),
        data.get("name"),
        data.get("project"),
        data.get("entity"),
        run_cap,
    )


def expand(sweep: Sweep, overrides: Iterable[str] = (), *, count: int | None = None, seed: int = 0) -> list[Config]:
    """All configurations of a sweep, each a plain nested dictionary, in the order in which W&B hands them out.

    Args:
        overrides: texts `a.b=value`, applied to every configuration; runs that become equal are kept once.
        count: how many runs to draw from a random sweep (default: the file's `run_cap`); for a grid, the most to take.
        seed: the draws of a random sweep are a function of this number.

    Raises:
        ConfigError: one line, for a sweep that the engine refuses or an override that cannot be applied.
    """
    cap = sweep.run_cap if count is None else count
    if cap is not None and cap < 1:
        raise ConfigError(f"the number of runs must be above zero (got {cap})")
    if sweep.method == "random" and cap is None:
        raise ConfigError(f"{sweep.source}: a random sweep never ends; give 'run_cap' in the file, or a count")
    assignments = [parse_override(text) for text in overrides]
    configs: dict[str, Config] = {}
    for config in _draw(sweep, sys.maxsize if cap is None else cap, seed):
        for path, value in assignments:
            config = override(config, path, value)
        configs.setdefault(json.dumps(config, sort_keys=True, default=str), config)
    return list(configs.values())


def select(configs: Sequence[ConfigT], index: int) -> ConfigT:
    """Grid point number `index`, counted from 0."""
    if not 0 <= index < len(configs):
        last = len(configs) - 1
        raise ConfigError(f"--index {index} is outside this sweep: it has {last + 1} runs, numbered from 0 to {last}")
    return configs[index]


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b=c` -> (("a", "b"), c). The value c is YAML: `3`, `null`, `[1, 2]`, `{log_space: 5}`, `1e-4` mean what they say."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: write it as key.subkey=value")
    return path, _plain(_parse_yaml(value, f"--set {text}"))


def override(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> Config:
    """A copy of `config` in which the entry at `path` is `value`; missing levels are made."""
    head, *rest = path
    if not rest:
        return {**config, head: value}
    inner = config.get(head)
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"--set {'.'.join(path)}: {head!r} is {inner!r}, which has no keys below it")
    return {**config, head: override(inner or {}, tuple(rest), value)}


def plain_config(config: Mapping[str, Any]) -> Config:
    """A configuration as W&B hands it to a run, without W&B's wrappers and keys: what `expand` gives offline."""
    own = {key: value for key, value in config.items() if key not in ("_wandb", "wandb_version")}
    return _plain({key: value["value"] if _is_wrapped(value) else value for key, value in own.items()})


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value and set(value) <= {"value", "desc"}


def engine() -> ModuleType:
    """W&B's sweep engine, imported on first use because it pulls in scipy and jsonschema."""
    with warnings.catch_warnings():
        # Its run record is declared the pydantic 1 way; both notices concern the package's authors only.
        warnings.filterwarnings(
            "ignore", message="Support for class-based `config` is deprecated", category=DeprecationWarning
        )
        warnings.filterwarnings("ignore", message="Valid config keys have changed in V2", category=UserWarning)
        import sweeps
    return sweeps


def _draw(sweep: Sweep, count: int, seed: int) -> list[Config]:
    """The engine's configurations, without its `value` wrappers."""
    sweeps = engine()
    try:
        if sweep.method == "grid":
            runs = sweeps.next_runs({"method": "grid", "parameters": sweep.parameters}, [], n=count)
            return [plain_config(run.config) for run in runs if run is not None]
        from sweeps.params import HyperParameterSet

        # The engine's own loop draws from Python's global generator; its parameters take the percentile just as well.
        parameters = HyperParameterSet.from_config(dict(sweep.parameters))
        generator = random.Random(seed)
        configs = []
        for _ in range(count):
            for parameter in parameters:
                parameter.value = parameter.ppf(generator.random())
            configs.append(plain_config(parameters.to_config()))
        return configs
    except Exception as error:  # the engine raises assertions, ValueErrors and jsonschema errors alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{sweep.source}: {reason}") from None


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{place}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None


def _plain(value: Any) -> Any:
    """Python's own types throughout: NumPy's scalars unpacked, `1e-4` a number whoever parsed the YAML."""
    if isinstance(value, str):
        return float(value) if _SCIENTIFIC.fullmatch(value) else value
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value.item() if hasattr(value, "item") else value


def _check_parameters(tree: Any, path: str, source: str) -> None:
    """Refuse, by name, what the engine would refuse without saying where."""
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{source}: {path} must be a mapping of parameters (got {tree!r})")
    for name, entry in tree.items():
        place = f"{path}.{name}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{source}: {place}: write 'value: {entry}' below it (got {entry!r})")
        for key in entry:
            if key not in _PARAMETER_KEYS:
                raise ConfigError(f"{source}: {place}: unknown key {key!r}: {_nearest(key, _PARAMETER_KEYS)}")
        if "parameters" in entry:
            _check_parameters(entry["parameters"], f"{place}.parameters", source)
        if "values" in entry and (not isinstance(entry["values"], list) or not entry["values"]):
            raise ConfigError(
                f"{source}: {place}.values must be a list with at least one entry (got {entry['values']!r})"
            )


def _nearest(key: object, known: Iterable[str]) -> str:
    near = get_close_matches(str(key), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
