"""The configuration that `wandb agent` hands over."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from icl.config import ConfigError
from icl.config.sweeps import Config, plain_config
from icl.tracking.wandb import WandbTracker, is_offline


@dataclass(frozen=True)
class AgentRun:
    """What `wandb agent` handed to this process."""

    run_id: str
    config: Config


def agent_run(environ: Mapping[str, str] = os.environ) -> AgentRun | None:
    """The run that a W&B agent started this process for, or None.

    Its configuration is read from the file that the agent writes, so a server that fell silent meanwhile stops nothing.

    Raises:
        ConfigError: the agent's file cannot be read.
    """
    path, run_id = environ.get("WANDB_SWEEP_PARAM_PATH"), environ.get("WANDB_RUN_ID")
    if not path or not run_id:
        return None
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration that the W&B agent left in {path}: {error}") from None
    return AgentRun(run_id, plain_config(config or {}))


def reject_agent_run(run: AgentRun, reason: str, environ: Mapping[str, str] = os.environ) -> None:
    """Show an invalid configuration on W&B as a failed run with the reason in its summary."""
    tracker = WandbTracker(None, {}, run_id=run.run_id, offline=is_offline(environ), notify=lambda line: None)
    tracker.finish("failed", reason)
