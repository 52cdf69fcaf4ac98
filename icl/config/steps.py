"""Grids of training steps: when something is saved, logged or sampled."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from icl.config.settings import ConfigError

Steps = tuple[int, ...] | Mapping[str, Any] | None


def expand_steps(steps: Steps | list[int], num_steps: int) -> list[int]:
    """The sorted list of training steps, out of 0..num_steps-1, that a step grid reaches.

    Args:
        steps: an explicit list, or a mapping with
            `log_space`: n for n logarithmic steps in [1, num_steps], or a triple [first, last, n];
            `linear_space`: n for n linear steps in [0, num_steps], or a triple;
            `log_subsample`, `linear_subsample`: keep every k-th of the sorted set.
            Values are truncated to integers, duplicates dropped, both sets united. None is the empty grid.
        num_steps: the length of the run. Steps from num_steps on never happen.

    Raises:
        ConfigError: an unknown key or a malformed value.
    """
    if steps is None:
        return []
    if not isinstance(steps, Mapping):
        if any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in steps):
            raise ConfigError(f"explicit steps must be integers from 0 on, got {list(steps)!r}")
        return sorted({step for step in steps if step < num_steps})
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
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"{kind}_subsample must be an integer from 1 on, got {every!r}")
        reached.update(sorted({int(value) for value in values})[::every])
    return sorted(step for step in reached if step < num_steps)


def _grid_triple(name: str, spec: Any, first: int, last: int) -> tuple[float, float, int]:
    triple = (first, last, spec) if isinstance(spec, int) else spec
    if not (
        isinstance(triple, (list, tuple))
        and len(triple) == 3
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in triple)
        and triple[0] >= first
        and triple[1] >= triple[0]
        and isinstance(triple[2], int)
        and triple[2] >= 0
    ):
        raise ConfigError(f"{name} must be a count or a triple [first >= {first}, last, count], got {spec!r}")
    return triple[0], triple[1], triple[2]


def _checked_steps(value: Any) -> Any:
    # A run of any length must accept the grid: only its form is checked here.
    expand_steps(value, 1)
    return tuple(value) if isinstance(value, list) else value


StepGrid = Annotated[Steps, BeforeValidator(_checked_steps)]
STEP_GRID = "a list, or {log_space: ..., linear_space: ...} with a count or [first, last, count]"
"""What a setting of this type may be, in the words of its description."""


def nearest_step(steps: Iterable[int], step: int) -> int:
    """The checkpointed step closest to the one asked for."""
    return min(steps, key=lambda candidate: (abs(candidate - step), candidate))
