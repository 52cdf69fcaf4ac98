"""`icl train` and `icl llc`: the runs of a sweep file, or the one run that a W&B agent hands over."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from icl.config import TrainingConfig
from icl.estimation import LLCConfig
from icl.jobs import Surroundings, available_cores, run_llc, run_training
from icl.settings import ConfigError
from icl.storage import StorageError
from icl.sweeps import expand, load_sweep, select
from icl.wandb_tracking import agent_run, reject_agent_run

Command = Literal["train", "llc"]

CONFIGS: dict[Command, type[TrainingConfig]] = {"train": TrainingConfig, "llc": LLCConfig}


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
    configs = [CONFIGS[command].parse(data) for data in expand(definition, overrides)]
    if index is not None:
        configs = [select(configs, index)]
    place = Surroundings.from_environment(tracking=tracking, project=definition.project, entity=definition.entity)
    if len(configs) == 1 and executor == "local":
        return _run_here(configs[0], replace(place, threads=jobs or available_cores(place.device)))
    if command == "train" and (executor == "batch" or (executor == "local" and jobs is None)):
        from icl.ensemble_runs import batches_runs, train_in_batches

        if executor == "batch" or batches_runs(place):
            return 0 if train_in_batches(configs, place) else 1
    from icl.executors import run_grid

    return run_grid(command, configs, place, jobs, executor)


def _run_for_agent(command: Command) -> int:
    run = agent_run()
    if run is None:
        raise ConfigError(
            f"give a sweep file: icl {command} SWEEP.yaml (without one, `wandb agent` must start this command)"
        )
    try:
        config = CONFIGS[command].parse(run.config)
    except ConfigError as error:
        reject_agent_run(run, str(error))
        print(f"icl: {error}", file=sys.stderr)
        # To the agent this run is dealt with: it stops for good after a few failures, and its queue holds valid runs.
        return 0
    try:
        place = Surroundings.from_environment(supervisor=os.getppid())
        return _run_here(config, replace(place, threads=available_cores(place.device)))
    except (
        ValueError,
        StorageError,
        OSError,
    ) as error:  # what keeps a run from starting; later failures record themselves
        reject_agent_run(run, str(error))
        raise


def _run_here(config: TrainingConfig, place: Surroundings) -> int:
    if isinstance(config, LLCConfig):
        left = run_llc(config, place)
        stopped = f"{config.llc_name} stopped with {left} checkpoints left" if left else ""
    else:
        outcome = run_training(config, place)
        done = f"{outcome.steps_done} of {config.num_steps} steps"
        stopped = "" if outcome.finished else f"{outcome.name} stopped after {done}"
    if stopped:
        print(f"icl: {stopped}; start it again to go on", file=sys.stderr)
    return 1 if stopped else 0
