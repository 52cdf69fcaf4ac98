"""Grids of training steps, at which something is saved, logged or sampled."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from icl.config.settings import ConfigError

MAX_COUNT = 1_000_000
"""The most steps of one grid, counted before duplicates are dropped."""

STEP_GRID = "a list, or {log_space: ..., linear_space: ...} with a count or [first, last, count]"
"""The forms that a setting of steps may have, for descriptions and messages."""

Steps = tuple[int, ...] | Mapping[str, Any] | None


def expand_steps(steps: Steps | list[int], num_steps: int) -> list[int]:
    """The sorted list of training steps in a step grid, out of 0..num_steps-1.

    Args:
        steps: an explicit list, or a mapping with
            `log_space`: n for n logarithmically spaced steps in [1, num_steps], or a triple [first, last, n];
            `linear_space`: n for n equally spaced steps in [0, num_steps], or a triple;
            `log_subsample`, `linear_subsample`: keep every k-th of the sorted set.
            Values are truncated to integers, duplicates are dropped, and both sets are united. None is the empty grid.
        num_steps: the length of the run. Steps from num_steps on are dropped.

    Raises:
        ConfigError: an unknown key or a malformed value.
    """
    if steps is None:
        return []
    if not isinstance(steps, (list, tuple, Mapping)):
        raise ConfigError(f"steps must be {STEP_GRID}, got {steps!r}")
    if not isinstance(steps, Mapping):
        wrong = [step for step in steps if not _is_whole(step) or step < 0]
        if wrong:
            raise ConfigError(f"explicit steps must be integers from 0 on, got {wrong[0]!r}")
        return sorted({int(step) for step in steps if step < num_steps})
    known = {"log_space", "linear_space", "log_subsample", "linear_subsample"}
    unknown = sorted(set(steps) - known)
    if unknown:
        raise ConfigError(f"unknown step grid {unknown[0]!r}; known: {', '.join(sorted(known))}")
    reached: set[int] = set()
    for kind, first in (("log", 1), ("linear", 0)):
        spec = steps.get(f"{kind}_space")
        if spec is None:
            continue
        start, stop, count = _grid_triple(f"{kind}_space", spec, first, num_steps)
        values = (
            np.logspace(math.log10(start), math.log10(stop), count)
            if kind == "log"
            else np.linspace(start, stop, count)
        )
        every = steps.get(f"{kind}_subsample")
        every = 1 if every is None else every
        if not _is_whole(every) or every < 1:
            raise ConfigError(f"{kind}_subsample must be an integer from 1 on, got {every!r}")
        reached.update(sorted({int(value) for value in values})[:: int(every)])
    return sorted(step for step in reached if step < num_steps)


def _grid_triple(name: str, spec: Any, first: int, last: int) -> tuple[float, float, int]:
    triple = (first, last, spec) if _is_whole(spec) else spec
    if not (
        isinstance(triple, (list, tuple))
        and len(triple) == 3
        and all(type(value) in (int, float) and abs(value) < 2**63 for value in triple)  # false for inf and nan, too
        and triple[0] >= first
        and triple[1] >= triple[0]
        and _is_whole(triple[2])
        and triple[2] >= 0
    ):
        raise ConfigError(f"{name} must be a count or a triple [first >= {first}, last, count], got {spec!r}")
    if triple[2] > MAX_COUNT:
        raise ConfigError(f"{name} asks for {int(triple[2]):,} steps, and at most {MAX_COUNT:,} are possible; lower it")
    return float(triple[0]), float(triple[1]), int(triple[2])


def _is_whole(value: Any) -> bool:
    """An integer, also one written as 1e3."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _checked_steps(value: Any) -> Any:
    # Only the form is checked here, because the length of the run is not known yet.
    expand_steps(value, 1)
    if isinstance(value, Mapping):
        return {key: int(entry) if _is_whole(entry) else entry for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


StepGrid = Annotated[Steps, BeforeValidator(_checked_steps)]


def nearest_step(steps: Iterable[int], step: int) -> int:
    """The step in `steps` that is closest to `step`; of two, the smaller."""
    return min(steps, key=lambda candidate: (abs(candidate - step), candidate))


def spread_in_log_time(steps: Collection[int], count: int) -> list[int]:
    """Choose `count` of `steps` as evenly as possible in log(step + 1). The first and the last are always chosen.

    The choice is greedy: each next step is the one farthest from all chosen before.

    Raises:
        ValueError: `count` is less than 2 while there are more steps than that.
    """
    ordered = sorted(set(steps))
    if len(ordered) <= count:
        return ordered
    if count < 2:
        raise ValueError(f"cannot keep {count} checkpoints: the first and the last always stay; keep 2 or more")
    time = np.log1p(ordered)
    chosen = [0, len(ordered) - 1]
    distance = np.minimum(time - time[0], time[-1] - time)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, abs(time - time[chosen[-1]]))
    return [ordered[index] for index in sorted(chosen)]


def refuse_missing_steps(wanted: Iterable[int], present: Collection[int], run: str) -> None:
    """Refuse steps that have no checkpoint.

    Raises:
        ConfigError: a wanted step has no checkpoint. The message names the first one and the nearest checkpoint.
    """
    missing = sorted(set(wanted) - set(present))
    if not missing:
        return
    more = f" (nor at {len(missing) - 1} more of the steps asked for)" if len(missing) > 1 else ""
    raise ConfigError(
        f"the run {run} has no checkpoint at step {missing[0]}{more}; the nearest is {nearest_step(present, missing[0])}: ask for that, "
        "or take the nearest with --nearest (in a sweep file, nearest: {value: true})"
    )
