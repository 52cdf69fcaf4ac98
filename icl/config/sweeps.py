"""Sweep files: reads a W&B sweep YAML and gives the plain configurations of its runs.

The same file works with `wandb sweep` and agents, and on this machine without an account. Both must see the same runs in
the same order. So the grid is expanded by the engine of the hosted service (the `sweeps` package). This module does not
interpret configurations; `icl.config.training` turns the plain dictionaries into typed records.
"""

import json
import math
import random
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from icl.config.settings import ConfigError
from icl.config.text import SCIENTIFIC, Scientific, parse_yaml, read_yaml

Config = dict[str, Any]
ConfigT = TypeVar("ConfigT")

_SWEEP_KEYS = (
    *("command", "controller", "description", "early_terminate", "entity", "imageuri", "job", "method", "metric"),
    *("name", "parameters", "program", "project", "run_cap", "runs"),
)
_PARAMETER_KEYS = (
    *("a", "b", "distribution", "max", "min", "mu", "parameters", "probabilities", "q", "sigma", "value", "values"),
)
_NUMBER_KEYS = ("a", "b", "max", "min", "mu", "q", "sigma")

MAX_RUNS = 10_000
MAX_PARAMETERS = 1_000
MAX_ENTRIES = 10_000_000
"""The most entries of all configurations of a sweep together."""


YAML = (".yaml", ".yml")
"""How the names of sweep files end."""


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
    runs: "RunsOf | None" = None
    """The training runs of an LLC sweep, if it names them instead of giving their settings."""


@dataclass(frozen=True)
class RunsOf:
    """The key `runs` of an LLC sweep: `{from: sweeps/mine.yaml}` (all runs of that training sweep), or a list of run names.

    Attributes:
        sweep: path of the training sweep as written. It is looked up from the working directory, then from the folder of this sweep file.
        names: the names of the runs.
        settings: all other keys below `runs`. They are settings of the estimates, such as `checkpoints: 3` and `preset: calibrated`.
    """

    sweep: str | None = None
    names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file. No code in it is run.

    Raises:
        ConfigError: there is no such file, its YAML is broken, or a key is given twice or unknown. The message is one
            line with the file and the line or the dotted key.
    """
    source = str(path)
    data = read_yaml(path, "sweep file")
    data, runs = _take_runs(data, source)
    if not isinstance(data, dict) or "parameters" not in data:
        raise ConfigError(f"{source}: a sweep file is a mapping with the keys 'method' and 'parameters'")
    for key in data:
        if key not in _SWEEP_KEYS:
            raise ConfigError(f"{source}: unknown key {key!r}: {_nearest(key, _SWEEP_KEYS)}")
    method = data.get("method")
    if method not in ("grid", "random"):
        raise ConfigError(f"{source}: method {method!r} is not one that runs offline; use 'grid' or 'random'")
    run_cap = _whole(data.get("run_cap"))
    if run_cap is not None and (type(run_cap) is not int or run_cap < 1):
        raise ConfigError(f"{source}: run_cap must be a whole number above zero (got {_shown(run_cap)})")
    command = data.get("command") or []
    if not isinstance(command, list):
        raise ConfigError(f"{source}: command must be a list of words (got {_shown(command)})")
    for key in ("name", "project", "entity"):
        if not isinstance(data.get(key), str | None):
            raise ConfigError(f"{source}: {key} must be text; put it in quotes (got {_shown(data[key])})")
    return Sweep(
        source,
        method,
        {} if runs and not data["parameters"] else _checked_parameters(data["parameters"], "parameters", source),
        tuple(map(str, command)),
        data.get("name"),
        data.get("project"),
        data.get("entity"),
        run_cap,
        runs,
    )


def _take_runs(data: Any, source: str) -> tuple[Any, RunsOf | None]:
    """A sweep file without `runs`, and its `runs`. The key may be at the top level or among the parameters."""
    if not isinstance(data, dict):
        return data, None
    parameters = data.get("parameters")
    if "runs" in data:
        given, rest = data["runs"], {key: value for key, value in data.items() if key != "runs"}
        rest.setdefault("parameters", {})
    elif isinstance(parameters, dict) and "runs" in parameters:
        entry = parameters["runs"]
        wrapped = next((key for key in ("value", "values") if isinstance(entry, dict) and key in entry), None)
        given = entry if wrapped is None else entry[wrapped]
        rest = {**data, "parameters": {key: value for key, value in parameters.items() if key != "runs"}}
    else:
        return data, None
    rest.setdefault("method", "grid")
    hint = f"{source}: runs must be {{from: SWEEP.yaml}}, or a list of run names (got {_shown(given)})"
    if isinstance(given, str):
        given = {"from": given} if given.endswith((".yaml", ".yml")) else [given]
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        return rest, RunsOf(names=tuple(given))
    if not isinstance(given, dict):
        raise ConfigError(hint)
    settings = _plain({key: value for key, value in given.items() if key not in ("from", "names")})
    names = given.get("names", [])
    if isinstance(given.get("from"), str) and not names:
        return rest, RunsOf(given["from"], settings=settings)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names) and "from" not in given:
        return rest, RunsOf(names=tuple(names), settings=settings)
    raise ConfigError(hint)


def expand(sweep: Sweep, overrides: Iterable[str] = (), *, count: int | None = None, seed: int = 0) -> list[Config]:
    """All configurations of a sweep, each a plain nested dictionary, in W&B's order.

    Args:
        overrides: texts `a.b=value`, applied to every configuration. Runs that become equal are kept once.
        count: number of runs to draw from a random sweep (default: the file's `run_cap`), or the most runs of a grid.
        seed: seed of the draws of a random sweep.

    Raises:
        ConfigError: the engine refuses the sweep, or an override cannot be applied. The message is one line.
    """
    cap = sweep.run_cap if count is None else count
    if cap is not None and cap < 1:
        raise ConfigError(f"the number of runs must be above zero (got {cap})")
    if sweep.method == "random" and cap is None:
        raise ConfigError(f"{sweep.source}: a random sweep never ends; give 'run_cap' in the file, or a count")
    _check_size(sweep, cap)
    drawn = _draw(sweep, sys.maxsize if cap is None else cap, seed) if sweep.parameters else [{}]
    return with_overrides(drawn, overrides)


def with_overrides(configs: Iterable[Config], overrides: Iterable[str]) -> list[Config]:
    """The configurations with settings changed by texts `a.b=value`. Those that become equal are kept once.

    Raises:
        ConfigError: an override cannot be applied.
    """
    assignments = [parse_override(text) for text in overrides]
    changed: dict[str, Config] = {}
    for config in configs:
        for path, value in assignments:
            config = override(config, path, value)
        changed.setdefault(json.dumps(config, sort_keys=True, default=str), config)
    return list(changed.values())


def select(configs: Sequence[ConfigT], index: int) -> ConfigT:
    """Grid point number `index`, counted from 0."""
    if not 0 <= index < len(configs):
        last = len(configs) - 1
        raise ConfigError(f"--index {index} is outside this sweep: it has {last + 1} runs, numbered from 0 to {last}")
    return configs[index]


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b=c` -> (("a", "b"), c). The value c is read as YAML, such as `3`, `null`, `[1, 2]`, `{log_space: 5}` or `1e-4`."""
    key, equals, value = text.partition("=")
    path, source = tuple(key.strip().split(".")), f"--set {' '.join(text.split())}"
    if not equals or not all(path):
        raise ConfigError(f"{source}: write it as key.subkey=value")
    return path, _plain(parse_yaml(value, source))


def override(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> Config:
    """A copy of `config` in which the entry at `path` is `value`. Missing levels are created."""
    head, *rest = path
    if not rest:
        return {**config, head: value}
    inner = config.get(head)
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"--set {'.'.join(path)}: {head!r} is {inner!r}, which has no keys below it")
    return {**config, head: override(inner or {}, tuple(rest), value)}


def plain_config(config: Mapping[str, Any]) -> Config:
    """A configuration that W&B gives to a run, without W&B's wrappers and keys. It equals what `expand` gives offline."""
    own = {key: value for key, value in config.items() if key not in ("_wandb", "wandb_version")}
    return _plain({key: value["value"] if _is_wrapped(value) else value for key, value in own.items()})


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value and set(value) <= {"value", "desc"}


def engine() -> ModuleType:
    """W&B's sweep engine, imported on first use because it pulls in scipy and jsonschema."""
    with warnings.catch_warnings():
        # The package declares its run record in pydantic 1 style. Both warnings concern its authors only.
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

        # The engine's own loop uses Python's global random state. Here each parameter gets a percentile from our generator.
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
        if reason.startswith("invalid hyperparameter"):
            reason += "; check its distribution, and the keys and values which that distribution needs"
        raise ConfigError(f"{sweep.source}: {reason}") from None


def _plain(value: Any) -> Any:
    """The value in Python's own types. NumPy scalars become numbers, and so does `1e-4` if a YAML parser left it a text."""
    if isinstance(value, str):
        return float(value) if SCIENTIFIC.match(value) else value
    if isinstance(value, Scientific):
        return float(value)
    if isinstance(value, date):  # YAML reads 2024-01-31 as a date
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value.item() if hasattr(value, "item") else value


def _checked_parameters(tree: Any, path: str, source: str) -> dict[str, Any]:
    """The parameters in plain types. What the engine would refuse is refused here, with its place in the message."""
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{source}: {path} must be a mapping of parameters (got {_shown(tree)})")
    checked = {}
    for name, entry in tree.items():
        place = f"{path}.{name}"
        if not isinstance(name, str):
            raise ConfigError(f"{source}: {place}: the name of a parameter must be text (got {name!r})")
        if "." in name:
            outer, inner = name.split(".", 1)
            nested = f"{outer}: {{parameters: {{{inner}: ...}}}}"
            raise ConfigError(f"{source}: {place}: a sweep file nests its keys; write {nested}")
        if not isinstance(entry, dict):
            raise ConfigError(f"{source}: {place}: write 'value: {_shown(entry)}' below it (got {_shown(entry)})")
        checked[name] = _checked_parameter(entry, place, source)
    return checked


def _checked_parameter(entry: Mapping[Any, Any], place: str, source: str) -> dict[str, Any]:
    for key in entry:
        if key not in _PARAMETER_KEYS:
            raise ConfigError(f"{source}: {place}: unknown key {key!r}: {_nearest(key, _PARAMETER_KEYS)}")
    given = [key for key in ("value", "values", "parameters") if key in entry]
    given += [" and ".join(ends)] if (ends := [key for key in _NUMBER_KEYS if key in entry]) else []
    if len(given) > 1:
        raise ConfigError(f"{source}: {place} has both {given[0]} and {given[1]}; keep one of them")
    if not given and "distribution" not in entry:
        raise ConfigError(f"{source}: {place} is empty; give it value, values, parameters, or min and max")
    if "parameters" in entry:
        inner = _checked_parameters(entry["parameters"], f"{place}.parameters", source)
        return {**_plain(entry), "parameters": inner}
    if "values" in entry and (not isinstance(entry["values"], list) or not entry["values"]):
        raise ConfigError(
            f"{source}: {place}.values must be a list with at least one entry (got {_shown(entry['values'])})"
        )
    if "probabilities" in entry and not _are_probabilities(entry["probabilities"], entry.get("values", ())):
        text = (
            f"probabilities must be one number of at least 0 per value, 1 in all (got {_shown(entry['probabilities'])})"
        )
        raise ConfigError(f"{source}: {place}.{text}")
    for key in _NUMBER_KEYS:
        if key in entry and not (type(entry[key]) in (int, float, Scientific) and abs(entry[key]) < 1e300):
            raise ConfigError(f"{source}: {place}.{key} must be a number (got {_shown(entry[key])})")
    return _plain(_whole_ends(entry))


def _are_probabilities(shares: Any, values: Sequence[Any]) -> bool:
    return (
        isinstance(shares, list)
        and len(shares) == len(values)
        and all(type(share) in (int, float, Scientific) and share >= 0 for share in shares)
        and math.isclose(sum(shares), 1.0, rel_tol=1e-6)
    )


def _whole_ends(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry; if it is a range of integers, ends such as 1e3 are made integers."""
    ends = {key: entry[key] for key in ("min", "max") if key in entry}
    meant = entry.get("distribution") == "int_uniform" or (
        "distribution" not in entry and any(type(end) is int for end in ends.values())
    )
    return {**entry, **{key: _whole(end) for key, end in ends.items()}} if meant else entry


def _whole(value: Any) -> Any:
    """A whole number written as 1e3 as an integer; anything else as it is."""
    return int(value) if isinstance(value, Scientific) and value.is_integer() else value


def _check_size(sweep: Sweep, cap: int | None) -> None:
    """Refuse a sweep that is too large, before it is expanded."""
    parameters = _count(sweep.parameters)
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"{sweep.source}: this sweep has {parameters:,} parameters, and at most {MAX_PARAMETERS:,} are possible; icl config "
            "lists the settings there are"
        )
    runs = _grid_size(sweep.parameters) if sweep.method == "grid" else cap or 0
    if runs > MAX_RUNS:
        remedy = (
            "take fewer values, or `method: random` with a run_cap" if sweep.method == "grid" else "lower its run_cap"
        )
        raise ConfigError(
            f"{sweep.source}: this sweep has {runs:,} runs, and at most {MAX_RUNS:,} are possible; {remedy}"
        )
    entries = runs * _most_entries(sweep.parameters)
    if entries > MAX_ENTRIES:
        raise ConfigError(
            f"{sweep.source}: its {runs:,} runs have {entries:,} entries in all, and at most {MAX_ENTRIES:,} are possible; "
            "shorten its lists, or split the file"
        )


def _count(parameters: Mapping[str, Any]) -> int:
    return len(parameters) + sum(_count(entry.get("parameters", {})) for entry in parameters.values())


def _grid_size(parameters: Mapping[str, Any]) -> int:
    """The number of points of a grid."""
    size = 1
    for entry in parameters.values():
        if "parameters" in entry:
            size *= _grid_size(entry["parameters"])
        elif "values" in entry:
            size *= len(entry["values"])
        elif "min" in entry and "max" in entry:
            # A range of integers, or one with steps of q. The engine refuses other ranges in a grid.
            step = max(entry.get("q", 1), 1e-300)
            size *= max(math.ceil(min((entry["max"] - entry["min"]) / step, 1e18)) + 1, 1)
    return size


def _most_entries(value: Any) -> int:
    """The number of entries of the largest configuration of a tree of parameters, or of one value."""
    if isinstance(value, Mapping):
        if isinstance(choices := value.get("values"), list):
            return max(map(_most_entries, choices), default=1)
        return 1 + sum(map(_most_entries, value.values()))
    return 1 + sum(map(_most_entries, value)) if isinstance(value, list) else 1


def _shown(value: Any) -> str:
    """A value in a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _nearest(key: object, known: Iterable[str]) -> str:
    near = get_close_matches(str(key), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
