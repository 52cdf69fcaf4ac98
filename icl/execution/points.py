"""The runs of a sweep file, typed: what `icl train`, `llc`, `calibrate` and `tabulate` are to work on.

An LLC sweep says which training runs it is about in one of three ways: it repeats their settings; it refers to them
(`runs: {from: sweeps/mine.yaml}`, or their names); or the file is the training sweep itself, and only how to sample is said
beside it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.config import ConfigError, Training, TrainingConfig
from icl.config.kinds import parse_training
from icl.config.sweeps import Config, RunsOf, Sweep, expand, load_sweep, with_overrides
from icl.estimation import LLCConfig
from icl.execution.opened import open_run


def training_points(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Training]:
    """The runs of a training sweep.

    Raises:
        ConfigError: the file is one of `icl llc`, or an override or a setting is wrong.
    """
    if sweep.runs is not None:
        raise ConfigError(f"{sweep.source} is a sweep of `icl llc`, as its key runs says; start icl llc {sweep.source}")
    return [parse_training(data) for data in expand(sweep, overrides)]


def llc_points(sweep: Sweep, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> list[LLCConfig]:
    """The estimates of an LLC sweep, or of a training sweep, in the order of the training runs.

    Raises:
        ConfigError: there are no such training runs, or an override or a setting is wrong.
    """
    points = expand(sweep)
    if sweep.runs is not None:
        own = {**sweep.runs.settings}
        points = [
            {**training, **own, **point}
            for training in _training_settings(sweep, sweep.runs, environ)
            for point in (_without_training(each, sweep) for each in points)
        ]
    return [LLCConfig.parse(data) for data in with_overrides(points, overrides)]


def says_how_to_sample(sweep: Sweep, overrides: Sequence[str]) -> bool:
    """Whether a sweep, or an override of it, has any setting of the estimates; a training sweep has none."""
    own = LLCConfig.user_fields().keys() - TrainingConfig.user_fields().keys()
    given = {*sweep.parameters, *(sweep.runs.settings if sweep.runs else ())}
    given |= {text.partition("=")[0].partition(".")[0].strip() for text in overrides}
    return bool(own & given)


def _training_settings(sweep: Sweep, runs: RunsOf, environ: Mapping[str, str]) -> list[Config]:
    if runs.sweep is None:
        return [open_run(name, environ).settings.model_dump(mode="json") for name in runs.names]
    beside = Path(sweep.source).parent / runs.sweep
    path = beside if beside.exists() and not Path(runs.sweep).exists() else Path(runs.sweep)
    return [config.model_dump(mode="json") for config in training_points(load_sweep(path))]


def _without_training(point: Config, sweep: Sweep) -> Config:
    """A point that says nothing of the training runs, which are given."""
    twice = sorted(point.keys() & TrainingConfig.user_fields().keys())
    if twice:
        raise ConfigError(
            f"{sweep.source}: {twice[0]} is a setting of the training runs, which `runs` gives; keep one of the two"
        )
    return point


def choice_overrides(preset: str | None, checkpoints: int | None, steps: str | None, nearest: bool) -> list[str]:
    """The overrides that the options of `icl llc` stand for: each takes the place of what the file says of the same thing.

    Raises:
        ConfigError: two options at once that choose the checkpoints, or an unknown preset.
    """
    from icl.sampling.presets import preset_override

    texts: list[str] = []
    if preset is not None:
        texts += ["preset=null", preset_override(preset)]
    if checkpoints is not None or steps is not None:
        if checkpoints is not None and steps is not None:
            raise ConfigError("--checkpoints and --steps both choose the checkpoints; give one of them")
        texts += ["step=null", "checkpoint_idx=null"]
        texts += (
            ["steps=null", f"checkpoints={checkpoints}"]
            if steps is None
            else ["checkpoints=null", f"steps={parse_steps(steps)}"]
        )
    return [*texts, *(["nearest=true"] if nearest else [])]


def parse_steps(text: str) -> list[int]:
    """`0,100,499` -> [0, 100, 499].

    Raises:
        ConfigError: it is no list of steps.
    """
    try:
        steps = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        steps = []
    if not steps or min(steps) < 0:
        raise ConfigError(f"--steps must be training steps with commas between them, such as 0,100,499 (got {text!r})")
    return steps
