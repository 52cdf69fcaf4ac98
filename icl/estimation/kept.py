"""What `icl llc` left of a run: its estimates, found again whatever checkpoints were chosen."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from icl.config import ConfigError
from icl.estimation.config import LLCConfig
from icl.estimation.traces import read_estimates, read_traces
from icl.sampling.config import SamplerConfig
from icl.sampling.presets import MEANS, preset_of
from icl.storage.files import read_file
from icl.storage.jsonl import parse_object

CONFIG = "config.json"
CHOICE = ("steps", "step", "checkpoint_idx", "checkpoints", "testing")
"""Settings that choose the checkpoints: estimates at others are more of the same."""


@dataclass(frozen=True)
class Estimates:
    """The estimates under one choice of sampler settings and checkpoints.

    Attributes:
        folder: `llc-<run>-<hash>`, where they lie.
    """

    folder: Path

    @property
    def name(self) -> str:
        """Of the estimates."""
        return self.folder.name

    @cached_property
    def stored(self) -> dict[str, Any]:
        """The settings as they were written with the estimates; empty where they are lost."""
        return read_object(self.folder / CONFIG) or {}

    @property
    def settings(self) -> LLCConfig:
        """The same, typed; raises `ConfigError` if this version does not take them."""
        return LLCConfig.parse(self.stored)

    @property
    def preset(self) -> str:
        """The name of the sampler's preset, or nothing if it is none."""
        return preset_of(self.settings.sampler_config) if self.stored else ""

    @property
    def rows(self) -> pd.DataFrame:
        """One row per checkpoint: `step` and the columns of `icl.sampling.LLCResult.summary` (`llc/mean`, `llc/mcse`,
        `verdict`, ...)."""
        return pd.DataFrame(read_estimates(self.folder))

    @property
    def traces(self) -> pd.DataFrame:
        """The course of the chains, thinned: `step`, `chain`, `draw`, `loss`, `distance`."""
        rows = [
            pd.DataFrame({"step": each["step"], "chain": chain, "draw": each["draw"], "loss": loss, "distance": far})
            for each in read_traces(self.folder)
            for chain, (loss, far) in enumerate(zip(each["loss"], each["distance"], strict=True))
        ]
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()

    def made_with(self, wanted: LLCConfig) -> LLCConfig | None:
        """The settings that these estimates were made with, if they are of the subject of `wanted`; else None.

        Raises:
            ConfigError: the name is that of `wanted`, and the settings are others.
        """
        wanted = wanted.of(wanted.training.with_kept_seed(self.stored))
        if self.name == wanted.name:
            if self.stored:
                wanted.refuse_another(self.stored, f"what {self.folder} holds")
            return wanted
        try:
            made = self.settings
        except ConfigError:  # of another version
            return None
        return made if _subject(made) == _subject(wanted) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none, or no file."""
    return parse_object(read_file(path)) if path.exists() else None


def estimates_of(subject: str, results: Path) -> list[Estimates]:
    """All estimates of a run or another subject, by its name."""
    pattern = re.compile(rf"llc-{re.escape(subject)}-[0-9a-f]{{8}}")
    folders = sorted(results.iterdir()) if results.is_dir() else ()
    return [Estimates(folder) for folder in folders if pattern.fullmatch(folder.name)]


def settings_of(config: LLCConfig) -> dict[str, Any]:
    """Plain data of what decides an estimate, less the choice of checkpoints, the means of computing, and the seeds that follow
    from the model's: what may tell rows of a table apart."""
    told = config.of(config.training.told()).model_dump(mode="json")
    kept = {key: told[key] for key in config.identity() if key in told and key not in CHOICE}
    sampler = {key: value for key, value in kept["sampler_config"].items() if key not in MEANS}
    return {**kept, "sampler_config": sampler}


def find_estimates(
    configs: Sequence[LLCConfig], results: Path, preset: str | None = None
) -> list[tuple[LLCConfig, Estimates]]:
    """The estimates of the runs of a sweep, each with the settings that it was made with: those under the sweep's own settings of
    the sampler, or the preset's. Where the runs have none of these, and no preset is asked for, those that they have.

    Raises:
        ConfigError: those they have are under several settings; or what is in a folder was made with other settings than its
            name says.
    """
    own: dict[str, tuple[LLCConfig, Estimates]] = {}
    others: dict[str, dict[str, tuple[LLCConfig, Estimates]]] = {}
    for config in configs:
        subject = config.name.removeprefix("llc-").rpartition("-")[0]
        for each in estimates_of(subject, results):
            made = each.made_with(config)
            if made is None or each.rows.empty:
                continue
            sampler = made.sampler_config
            if preset_of(sampler) == preset if preset else _text(sampler) == _text(config.sampler_config):
                own.pop(each.name, None)  # a sweep's own choice of checkpoints comes last, and counts
                own[each.name] = made, each
            else:
                others.setdefault(_text(sampler), {})[each.name] = made, each
    if own or not others or preset:
        return list(own.values())
    if len(others) > 1:
        ways = sorted(way(made) for (made, _), *_ in (list(found.values()) for found in others.values()))
        raise ConfigError(
            f"the runs of this sweep have estimates under {len(others)} settings of the sampler ({'; '.join(ways)}); choose with "
            "--preset, or with --set sampler_config.KEY=VALUE"
        )
    return list(next(iter(others.values())).values())


def _subject(config: LLCConfig) -> dict[str, Any]:
    return {key: value for key, value in settings_of(config).items() if key != "sampler_config"}


def _text(sampler: SamplerConfig) -> str:
    return json.dumps(sampler.model_dump(mode="json", exclude=set(MEANS)), sort_keys=True)


def way(config: LLCConfig) -> str:
    """Sampler settings in a few words."""
    sampler = config.sampler_config
    told = {name: getattr(sampler, name) for name in ("epsilon", "gamma", "nbeta", "num_chains", "num_draws")}
    given = ", ".join(f"{name} {value:g}" for name, value in told.items() if value is not None)
    return preset_of(sampler) or f"{sampler.sampling_method} with {given}"
