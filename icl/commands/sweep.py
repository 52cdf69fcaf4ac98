"""`icl train` and `icl llc`: do the runs of a sweep file, or the one run that a W&B agent gives."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icl.checkpoints import CheckpointError
from icl.commands.dry_run import dry_run, jobs_of, say_before_a_long_start
from icl.config import ConfigError
from icl.config.sweeps import Sweep, expand, load_sweep
from icl.devices import available_cores, devices_for_runs
from icl.estimation import LLCConfig
from icl.execution.closing import say_how_it_ended
from icl.execution.llc_run import subject_of
from icl.execution.names import RunConfig, attempt, distinct, numbered, said_of_merged, sound, training_of
from icl.execution.output import OUTPUT, copied_to
from icl.execution.points import llc_settings, says_how_to_sample
from icl.execution.run import CONFIGS, Command, parse_config, run_point
from icl.execution.signals import status_of_stop
from icl.execution.surroundings import SUPERVISOR, Surroundings
from icl.execution.training_runs import batches_runs, train_in_batches
from icl.sampling.presets import PRESETS
from icl.storage import StorageError
from icl.subjects.named import check_subject
from icl.tracking.agent import RUN_ID_VARIABLE, agent_run, reject_agent_run
from icl.tracking.wandb import say


def run_sweep_command(
    command: Command,
    sweep: Path | None,
    index: int | None,
    overrides: Sequence[str],
    jobs: int | None,
    executor: str,
    tracking: str,
    dry: bool = False,
) -> int:
    """Do `icl train` or `icl llc` (see the commands' help); returns the exit status.

    Raises:
        ConfigError: the file, an override or a configuration is wrong. Nothing was started.
    """
    if tracking not in ("auto", "local", "wandb", "none"):
        raise ConfigError(f"--tracking must be auto, local, wandb or none (got {tracking!r})")
    if sweep is None:
        if dry:
            raise ConfigError(f"--dry-run needs a sweep file: icl {command} SWEEP.yaml --dry-run")
        return _run_for_agent(command)
    definition = load_sweep(sweep)
    points = _points(command, definition, overrides)
    runs = distinct(points)
    configs = [sound(run) for run in runs] if index is None else [numbered(runs, index)]
    for config in configs:
        _check(config)
    if SUPERVISOR not in os.environ and (merged := said_of_merged(points, runs)):
        print(f"icl: {sweep}: {merged}", file=sys.stderr)
    if len(configs) > 1 and os.environ.pop(RUN_ID_VARIABLE, None):
        say(f"{RUN_ID_VARIABLE} names one W&B run, but {sweep} has {len(configs)} runs: each gets another id")
    place = Surroundings.from_environment(tracking=tracking, project=definition.project, entity=definition.entity)
    if not dry:
        _refuse_hopeless(configs, place)
    if SUPERVISOR not in os.environ:
        at_once, threads = jobs_of(configs, place, jobs)
        measured = replace(place, threads=threads)
        if dry:
            dry_run(configs, measured, at_once, time.process_time())
            return 0
        say_before_a_long_start(configs, measured, at_once)
    status = _run_all(command, configs, place, jobs, executor)
    if SUPERVISOR not in os.environ:  # otherwise the sweep that started this run reports on all runs at its end
        say_how_it_ended(configs, place)
    return status


def _points(command: Command, sweep: Sweep, overrides: Sequence[str]) -> list[RunConfig | ConfigError]:
    """The points of a sweep file. An invalid one is the error that says so."""
    if command == "llc":
        if not says_how_to_sample(sweep, overrides):
            raise ConfigError(
                f"{sweep.source} has no settings of the sampler; choose them, as in: icl llc {sweep.source} --preset automatic "
                f"(presets: {', '.join(PRESETS)}; `icl presets` explains them)"
            )
        return [attempt(LLCConfig.parse, data) for data in llc_settings(sweep, overrides)]
    if sweep.runs is not None:
        raise ConfigError(f"{sweep.source} has the key runs, so it is for `icl llc`; start icl llc {sweep.source}")
    return [attempt(lambda data: _parse(command, data, sweep.source), data) for data in expand(sweep, overrides)]


def _refuse_hopeless(configs: Sequence[RunConfig], place: Surroundings) -> None:
    """Refuse a sweep in which no run has the chosen checkpoints, before anything is started.

    Raises:
        ConfigError: no run has them. The message is that of the first run.
    """
    errors: list[ConfigError] = []
    for config in configs:
        if not isinstance(config, LLCConfig):
            return
        try:
            config = config.of(place.with_kept_seed(config.training))
            config.chosen_steps(subject_of(config, place).steps())
        except ConfigError as error:
            errors.append(error)
        except (CheckpointError, StorageError):
            return  # the run itself will report what is wrong
        else:
            return
    if errors:
        raise errors[0]


def _run_all(
    command: Command, configs: Sequence[RunConfig], place: Surroundings, jobs: int | None, executor: str
) -> int:
    if len(configs) == 1 and executor == "local":
        return _run(configs[0], replace(place, threads=jobs or available_cores(place.device)))
    batched = executor == "batch" or (executor == "local" and jobs is None and batches_runs(place))
    batched = batched and command == "train"
    if batched and len(devices_for_runs(place.device)) == 1:
        return 0 if train_in_batches([training_of(config) for config in configs], place) else status_of_stop()
    from icl.execution.sweep import run_sweep

    return run_sweep(command, configs, place, jobs, "local" if batched else executor, batched)


def _parse(command: Command, data: Mapping[str, Any], source: str) -> RunConfig:
    try:
        return parse_config(command, data)
    except ConfigError as error:
        unknown = data.keys() - CONFIGS[command].user_fields().keys()
        for other in CONFIGS:
            if foreign := sorted(unknown & CONFIGS[other].user_fields().keys()):
                text = f"{source} has the key {foreign[0]}, so it is for `icl {other}`; start icl {other} {source}"
                raise ConfigError(text) from None
        raise ConfigError(f"{source}: {error}") from None


def _check(config: RunConfig) -> None:
    """Check a user's own subject.

    Raises:
        ConfigError: the class cannot be imported, is not a subject, or does not accept its settings.
    """
    if isinstance(config, LLCConfig) and not config.is_regression:
        check_subject(config.subject, config.subject_config)


def _run_for_agent(command: Command) -> int:
    run = agent_run()
    if run is None:
        raise ConfigError(
            f"give a sweep file: icl {command} SWEEP.yaml (without one, `wandb agent` must start this command)"
        )
    try:
        config = _parse(command, run.config, "the configuration from W&B")
        _check(config)
    except ConfigError as error:
        reject_agent_run(run, str(error))
        print(f"icl: {error}", file=sys.stderr)
        # Status 0, because an agent stops for good after a few failures, and its next runs may be valid.
        return 0
    try:
        place = Surroundings.from_environment(supervisor=os.getppid())
        with copied_to(place.results / config.name / OUTPUT):
            return _run(config, replace(place, threads=available_cores(place.device)))
    except (
        ValueError,
        StorageError,
        OSError,
    ) as error:  # errors before the run's record is open; later ones are recorded there
        reject_agent_run(run, str(error))
        raise


def _run(config: RunConfig, place: Surroundings) -> int:
    left = run_point(config, place)
    if left:
        print(f"icl: {left}; start it again to continue", file=sys.stderr)
    return status_of_stop() if left else 0
