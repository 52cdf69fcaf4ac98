"""The configuration that `wandb agent` hands over."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icl.config import ConfigError
from icl.tracking.wandb import WandbTracker, is_offline

if TYPE_CHECKING:
    from icl.config.sweeps import Config

RUN_ID_VARIABLE = "WANDB_RUN_ID"
"""The environment variable that says which W&B run a process continues."""


@dataclass(frozen=True)
class AgentRun:
    """What `wandb agent` handed to this process."""

    run_id: str
    config: "Config"


def agent_run(environ: Mapping[str, str] = os.environ) -> AgentRun | None:
    """The run that a W&B agent started this process for, or None.

    The configuration is read from the file that the agent writes. So it works even if the server no longer answers.

    Raises:
        ConfigError: the agent's file cannot be read.
    """
    path, run_id = environ.get("WANDB_SWEEP_PARAM_PATH"), environ.get(RUN_ID_VARIABLE)
    if not path or not run_id:
        return None
    from icl.config.sweeps import plain_config
    from icl.config.text import read_yaml

    config = read_yaml(path, "configuration that the W&B agent left in") or {}
    if not isinstance(config, dict):
        raise ConfigError(f"cannot read the configuration that the W&B agent left in {path}: it is not a mapping")
    return AgentRun(run_id, plain_config(config))


def reject_agent_run(run: AgentRun, reason: str, environ: Mapping[str, str] = os.environ) -> None:
    """Show an invalid configuration on W&B as a failed run with the reason in its summary."""
    tracker = WandbTracker(None, {}, run_id=run.run_id, offline=is_offline(environ), notify=lambda line: None)
    tracker.finish("failed", reason)
