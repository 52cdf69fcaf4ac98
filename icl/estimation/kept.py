"""Reading the estimates that `icl llc` stored, whichever checkpoints were chosen."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from icl.checkpoints.runs import estimates_among
from icl.config import ConfigError
from icl.estimation.config import LLCConfig
from icl.estimation.traces import read_estimates, read_traces
from icl.sampling.config import SamplerConfig
from icl.sampling.presets import MEANS, preset_of
from icl.storage.files import read_file
from icl.storage.jsonl import parse_object

CONFIG = "config.json"
CHOICE = ("steps", "step", "checkpoint_idx", "checkpoints", "testing")
"""Settings that choose the checkpoints. Estimates that differ only in these belong together."""


@dataclass(frozen=True)
class Estimates:
    """The estimates of one subject under one choice of sampler settings and checkpoints.

    Attributes:
        folder: `llc-<run>-<hash>`, the folder that holds them.
    """

    folder: Path

    @property
    def name(self) -> str:
        """The name of the estimates."""
        return self.folder.name

    @cached_property
    def stored(self) -> dict[str, Any]:
        """The settings as they were stored with the estimates; empty if they are missing or damaged."""
        return read_object(self.folder / CONFIG) or {}

    @property
    def settings(self) -> LLCConfig:
        """`stored` as a typed record; raises `ConfigError` if this version does not accept them."""
        return LLCConfig.parse(self.stored)

    @property
    def preset(self) -> str:
        """The name of the preset that the sampler's settings equal; empty if there is none."""
        return preset_of(self.settings.sampler_config) if self.stored else ""

    @property
    def rows(self) -> pd.DataFrame:
        """One row per checkpoint: `step` and the columns of `icl.sampling.LLCResult.summary` (`llc/mean`, `llc/mcse`,
        `verdict`, ...)."""
        return pd.DataFrame(read_estimates(self.folder))

    @property
    def traces(self) -> pd.DataFrame:
        """The loss and distance of the chains along their draws, thinned: `step`, `chain`, `draw`, `loss`, `distance`."""
        rows = [
            pd.DataFrame({"step": each["step"], "chain": chain, "draw": each["draw"], "loss": loss, "distance": far})
            for each in read_traces(self.folder)
            for chain, (loss, far) in enumerate(zip(each["loss"], each["distance"], strict=True))
        ]
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()

    def made_with(self, wanted: LLCConfig) -> LLCConfig | None:
        """The settings that these estimates were made with, if their subject is that of `wanted`; otherwise None.

        Raises:
            ConfigError: the name is that of `wanted`, but the settings differ.
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
    """The JSON object in a file; None if there is no file or it does not hold one."""
    return parse_object(read_file(path)) if path.exists() else None


def estimates_of(subject: str, results: Path) -> list[Estimates]:
    """All estimates of the run or other subject with this name."""
    folders = (folder.name for folder in results.iterdir()) if results.is_dir() else ()
    return [Estimates(results / name) for name in estimates_among(folders, subject)]


def settings_of(config: LLCConfig) -> dict[str, Any]:
    """Plain data of the settings in which rows of a table may differ.

    These are the settings that decide an estimate, without the choice of checkpoints, the means of computing (such as cores), and
    the seeds that are derived from the model's seed.
    """
    plain = config.of(config.training.without_derived_seeds()).model_dump(mode="json")
    kept = {key: plain[key] for key in config.identity() if key in plain and key not in CHOICE}
    sampler = {key: value for key, value in kept["sampler_config"].items() if key not in MEANS}
    return {**kept, "sampler_config": sampler}


def find_estimates(
    configs: Sequence[LLCConfig], results: Path, preset: str | None = None
) -> list[tuple[LLCConfig, Estimates]]:
    """The estimates of the runs of a sweep, each with the settings that it was made with.

    These are the estimates under the sampler settings of `preset`, or of the sweep if `preset` is None. If `preset` is None and there are
    none under the sweep's settings, the estimates under other settings are taken, as long as these are the same for all.

    Raises:
        ConfigError: the estimates under other settings are under several; or a folder's settings do not match its name.
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
                own.pop(each.name, None)  # moved to the end, because of equals the last one counts (`tabulate`)
                own[each.name] = made, each
            else:
                others.setdefault(_text(sampler), {})[each.name] = made, each
    if own or not others or preset:
        return list(own.values())
    if len(others) > 1:
        ways = sorted(sampler_label(made) for (made, _), *_ in (list(found.values()) for found in others.values()))
        raise ConfigError(
            f"the runs of this sweep have estimates under {len(others)} settings of the sampler ({'; '.join(ways)}); choose one with "
            "--preset, or with --set sampler_config.KEY=VALUE"
        )
    return list(next(iter(others.values())).values())


def _subject(config: LLCConfig) -> dict[str, Any]:
    return {key: value for key, value in settings_of(config).items() if key != "sampler_config"}


def _text(sampler: SamplerConfig) -> str:
    return json.dumps(sampler.model_dump(mode="json", exclude=set(MEANS)), sort_keys=True)


def sampler_label(config: LLCConfig) -> str:
    """The sampler's settings in a few words: the preset's name, or the method and the main numbers."""
    sampler = config.sampler_config
    values = {name: getattr(sampler, name) for name in ("epsilon", "gamma", "nbeta", "num_chains", "num_draws")}
    given = ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None)
    return preset_of(sampler) or f"{sampler.sampling_method} with {given}"
