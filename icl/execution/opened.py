"""Runs as objects: their settings, their metrics and estimates as tables, their checkpoints as models.

    run = icl.open_run("L2H4Minf-K8-seed0-1a2b3c4d")    # or runs = icl.open_runs("my-sweep.yaml")
    run.metrics.plot("step", "pretrain/mse")
    run.model(run.steps[-1])

Nothing here writes. Tables are read again each time, so a growing run shows its newest row.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from icl.checkpoints import Checkpoints
from icl.checkpoints.run import FOLDER
from icl.config import ConfigError, Training
from icl.config.kinds import parse_training
from icl.config.language import LanguageTask
from icl.config.settings import dotted
from icl.config.sweeps import expand, load_sweep
from icl.config.training import TaskConfig
from icl.config.varying import varying
from icl.estimation.kept import Estimates, estimates_of
from icl.model import InContextRegressionTransformer
from icl.storage import LocalStore, Store, local_root, store_from_environment
from icl.subjects.language import AttentionOnlyTransformer
from icl.tracking import read_metrics, read_summary


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its name.
        store: the store with its checkpoints.
        results: the folder that holds the results folders of all runs.
    """

    name: str
    store: Store
    results: Path

    @property
    def checkpoints(self) -> Checkpoints:
        """The files of its checkpoints."""
        return Checkpoints(self.store, self.name)

    @cached_property
    def settings(self) -> Training:
        """The settings of the run, with all seeds resolved.

        Raises:
            ConfigError: no settings are stored, or this version does not accept them.
        """
        stored = self.checkpoints.settings()
        if stored is None:
            raise ConfigError(f"the run {self.name} has no stored settings; check its name (`icl runs` lists all runs)")
        return parse_training(stored)

    @property
    def config(self) -> pd.DataFrame:
        """The settings as one row: `run`, then every setting under its dotted name, such as `optimizer_config.lr`."""
        flat = {
            key: _cell(value)
            for key, value in dotted(self.settings.without_derived_seeds().model_dump(mode="json")).items()
        }
        return pd.DataFrame([{"run": self.name, **flat}])

    @property
    def metrics(self) -> pd.DataFrame:
        """The logged metrics, one row per step: `step`, `batch/loss` and, on the logging grid, `pretrain/mse`, ..."""
        return pd.DataFrame(read_metrics(self.results / self.name))

    @property
    def summary(self) -> dict[str, Any]:
        """The last metrics of the run, and its `status`."""
        return read_summary(self.results / self.name)

    @property
    def estimate_sets(self) -> list[Estimates]:
        """Its estimates, one entry for each choice of sampler settings and checkpoints, by name."""
        return estimates_of(self.name, self.results)

    @property
    def estimates(self) -> pd.DataFrame:
        """All estimates: `estimates` (their name), `preset`, `step`, then the columns of `Estimates.rows`."""
        parts = [(each, each.rows) for each in self.estimate_sets]
        tables = [rows.assign(estimates=each.name, preset=each.preset) for each, rows in parts if len(rows)]
        return _first(_joined(tables), "estimates", "preset", "step")

    @property
    def steps(self) -> list[int]:
        """The steps of its checkpoints, ascending."""
        return self.checkpoints.steps()

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.checkpoints.finished_step() is not None

    def model(self, step: int) -> InContextRegressionTransformer | AttentionOnlyTransformer:
        """The model at a checkpoint, on the CPU: the regression transformer, or the language model.

        Raises:
            CheckpointError: there is no checkpoint at this step, or it is damaged.
        """
        weights, task = self.checkpoints.expect(self.settings).load(step), self.settings.task_config
        if isinstance(task, LanguageTask):
            return AttentionOnlyTransformer.from_weights(weights)
        assert isinstance(task, TaskConfig)
        return InContextRegressionTransformer.from_weights(task.shape, weights)


@dataclass(frozen=True)
class Runs(Sequence[Run]):
    """Several runs as a sequence of `Run`, with tables over all of them.

    Attributes:
        runs: in the order of the sweep.
        differing: the dotted names of the settings that vary, such as `optimizer_config.lr`.
    """

    runs: tuple[Run, ...]
    differing: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: Any) -> Any:
        return self.runs[index]

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    @property
    def config(self) -> pd.DataFrame:
        """One row per run: `run`, then every setting under its dotted name."""
        return _joined([run.config for run in self.runs])

    @property
    def metrics(self) -> pd.DataFrame:
        """The metrics of all runs: `run`, the settings that vary, then the columns of `Run.metrics`."""
        return self._labelled([(run, run.metrics) for run in self.runs])

    @property
    def estimates(self) -> pd.DataFrame:
        """The estimates of all runs: `run`, the settings that vary, then the columns of `Run.estimates`."""
        return self._labelled([(run, run.estimates) for run in self.runs])

    def _labelled(self, parts: Sequence[tuple[Run, pd.DataFrame]]) -> pd.DataFrame:
        labels = self.config.set_index("run").reindex(columns=list(self.differing))
        # Cell by cell, because a whole row has one type: beside a float, a seed would be one, too.
        tables = [
            table.assign(run=run.name, **{name: labels.at[run.name, name] for name in self.differing})
            for run, table in parts
            if len(table)
        ]
        return _first(_joined(tables), "run", *self.differing)


def open_run(name: str | Path, environ: Mapping[str, str] = os.environ) -> Run:
    """A trained run, by its name (`icl runs` lists them) or by its folder `<root>/icl/<name>`.

    Raises:
        ConfigError: there is no such run; the message names the one with the most similar name.
    """
    folder = Path(name).resolve()
    if folder.is_dir() and os.sep in str(name):
        if folder.parent.name != FOLDER:
            raise ConfigError(f"{name} is not the folder of a run; give the one that holds config.json, ROOT/icl/RUN")
        run = Run(folder.name, LocalStore(folder.parent.parent), folder.parent)
    else:
        run = Run(str(name), store_from_environment(environ), local_root(environ) / FOLDER)
    if run.checkpoints.settings() is None:
        raise ConfigError(f"there is no run {run.name!r} in {run.store}; {_known(run)}")
    return run


def open_runs(sweep: str | Path | Sequence[str], environ: Mapping[str, str] = os.environ) -> Runs:
    """The runs of a training sweep file that have started, or the runs with the given names.

    Raises:
        ConfigError: the file is wrong, there is no such run, or no run has started.
    """
    if not isinstance(sweep, (str, Path)):
        runs = [open_run(name, environ) for name in sweep]
    else:
        store, results = store_from_environment(environ), local_root(environ) / FOLDER
        names = dict.fromkeys(parse_training(data).name for data in expand(load_sweep(sweep)))
        every = [Run(name, store, results) for name in names]
        runs = [run for run in every if run.checkpoints.settings() is not None]
        if not runs:
            raise ConfigError(f"no run of {sweep} has begun; start it with: icl train {sweep}")
    return together(runs)


def together(runs: Sequence[Run]) -> Runs:
    """Runs that are open, as one object with tables over all of them."""
    settings = [run.settings.without_derived_seeds().model_dump(mode="json") for run in runs]
    return Runs(tuple(runs), tuple(varying(settings)))


def _known(run: Run) -> str:
    names = sorted({key.split("/")[1] for key in run.store.list(FOLDER)} - {run.name})
    names = [name for name in names if not name.startswith("llc-")]
    near = get_close_matches(run.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"known runs: {', '.join(names[:5])}" if names else "train one with: icl train SWEEP.yaml"


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _first(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The table with those of these columns first that it has."""
    first = [name for name in columns if name in table.columns]
    rest = [name for name in table.columns if name not in first]
    return pd.DataFrame(table, columns=pd.Index([*first, *rest]))


def _cell(value: Any) -> Any:
    """A setting as a cell of a table. A list becomes a text."""
    return str(value) if isinstance(value, list) else value
