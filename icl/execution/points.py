"""The runs of a sweep file as typed settings, for `icl train`, `llc`, `calibrate` and `tabulate`.

An LLC sweep names its training runs in one of three ways. It repeats their settings. Or it refers to them, by
`runs: {from: sweeps/mine.yaml}` or by their names. Or the file is the training sweep itself, and the settings of the sampler
come from the command's options.
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
        ConfigError: the file is an LLC sweep, or an override or a setting is wrong.
    """
    if sweep.runs is not None:
        raise ConfigError(f"{sweep.source} has the key runs, so it is for `icl llc`; start icl llc {sweep.source}")
    return [parse_training(data) for data in expand(sweep, overrides)]


def llc_points(sweep: Sweep, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> list[LLCConfig]:
    """The estimates of an LLC sweep, or of a training sweep, in the order of the training runs.

    Raises:
        ConfigError: a training run does not exist, or an override or a setting is wrong.
    """
    return [LLCConfig.parse(data) for data in llc_settings(sweep, overrides, environ)]


def llc_settings(sweep: Sweep, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> list[Config]:
    """The same as plain data. They may be wrong.

    Raises:
        ConfigError: a training run does not exist, or an override cannot be applied.
    """
    points = expand(sweep)
    if sweep.runs is not None:
        own = {**sweep.runs.settings}
        points = [
            {**training, **own, **point}
            for training in _training_settings(sweep, sweep.runs, environ)
            for point in (_without_training(each, sweep) for each in points)
        ]
    return with_overrides(points, overrides)


def says_how_to_sample(sweep: Sweep, overrides: Sequence[str]) -> bool:
    """Whether a sweep or its overrides have any setting of the estimates. A training sweep has none."""
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
    """Return the point, after checking that it has no settings of the training runs, which `runs` gives."""
    twice = sorted(point.keys() & TrainingConfig.user_fields().keys())
    if twice:
        raise ConfigError(
            f"{sweep.source}: {twice[0]} is a setting of the training runs, which `runs` gives; keep one of the two"
        )
    return point


def choice_overrides(preset: str | None, checkpoints: int | None, steps: str | None, nearest: bool) -> list[str]:
    """The options of `icl llc` as overrides. Each option replaces the file's settings for the same thing.

    Raises:
        ConfigError: two options choose the checkpoints, or the preset is unknown.
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
        ConfigError: the text is not a list of steps.
    """
    try:
        steps = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        steps = []
    if not steps or min(steps) < 0:
        raise ConfigError(f"--steps must be training steps with commas between them, such as 0,100,499 (got {text!r})")
    return steps
