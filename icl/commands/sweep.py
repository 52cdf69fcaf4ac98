"""`icl train` and `icl llc`: the runs of a sweep file, or the one run that a W&B agent hands over."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icl.config import ConfigError
from icl.config.sweeps import expand, load_sweep, select
from icl.devices import available_cores
from icl.execution.names import RunConfig, training_of
from icl.execution.run import CONFIGS, Command, run_point
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import batches_runs, train_in_batches
from icl.storage import StorageError
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
) -> int:
    """The exit status of `icl train` or `icl llc`; see the commands' help.

    Raises:
        ConfigError: the file, an override or a configuration is wrong; nothing has run.
    """
    if tracking not in ("auto", "local", "wandb", "none"):
        raise ConfigError(f"--tracking must be auto, local, wandb or none (got {tracking!r})")
    if sweep is None:
        return _run_for_agent(command)
    definition = load_sweep(sweep)
    configs = [_parse(command, data, str(sweep)) for data in expand(definition, overrides)]
    if index is not None:
        configs = [select(configs, index)]
    if len(configs) > 1 and os.environ.pop(RUN_ID_VARIABLE, None):
        say(f"{RUN_ID_VARIABLE} names one W&B run, and {sweep} has {len(configs)}: each gets an id of its own")
    place = Surroundings.from_environment(tracking=tracking, project=definition.project, entity=definition.entity)
    if len(configs) == 1 and executor == "local":
        return _run(configs[0], replace(place, threads=jobs or available_cores(place.device)))
    batched = executor == "batch" or (executor == "local" and jobs is None and batches_runs(place))
    if command == "train" and batched:
        return 0 if train_in_batches([training_of(config) for config in configs], place) else 1
    from icl.execution.sweep import run_sweep

    return run_sweep(command, configs, place, jobs, executor)


def _parse(command: Command, data: Mapping[str, Any], source: str) -> RunConfig:
    try:
        return CONFIGS[command].parse(data)
    except ConfigError as error:
        unknown = data.keys() - CONFIGS[command].user_fields().keys()
        for other in CONFIGS:
            if foreign := sorted(unknown & CONFIGS[other].user_fields().keys()):
                text = f"{source} is a sweep of `icl {other}`, as its key {foreign[0]} says; start icl {other} {source}"
                raise ConfigError(text) from None
        raise ConfigError(f"{source}: {error}") from None


def _run_for_agent(command: Command) -> int:
    run = agent_run()
    if run is None:
        raise ConfigError(
            f"give a sweep file: icl {command} SWEEP.yaml (without one, `wandb agent` must start this command)"
        )
    try:
        config = _parse(command, run.config, "the configuration from W&B")
    except ConfigError as error:
        reject_agent_run(run, str(error))
        print(f"icl: {error}", file=sys.stderr)
        # To the agent this run is dealt with: it stops for good after a few failures, and its queue holds valid runs.
        return 0
    try:
        place = Surroundings.from_environment(supervisor=os.getppid())
        return _run(config, replace(place, threads=available_cores(place.device)))
    except (
        ValueError,
        StorageError,
        OSError,
    ) as error:  # what keeps a run from starting; later failures record themselves
        reject_agent_run(run, str(error))
        raise


def _run(config: RunConfig, place: Surroundings) -> int:
    left = run_point(config, place)
    if left:
        print(f"icl: {left}; start it again to go on", file=sys.stderr)
    return 1 if left else 0
