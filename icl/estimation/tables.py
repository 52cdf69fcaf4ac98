"""Tables of the estimates that `icl llc` stored, and tables of the developmental stages that they show."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from icl import __version__
from icl.analysis.run_tables import (
    SEED,
    SEED_COLUMN,
    RunStep,
    RunTable,
    column_of,
    keys_of,
    label_of,
    read_run_table,
    setting_of,
    values_of,
    without,
    write_run_tables,
)
from icl.analysis.stages import (
    FEWEST_ESTIMATES,
    PUBLISHED_STAGE_ENDS,
    boundary_table,
    detectable,
    find_boundaries,
    stage_table,
)
from icl.analysis.tables import read_table
from icl.config import ConfigError
from icl.config.settings import dotted
from icl.config.varying import varying
from icl.estimation.config import LLCConfig
from icl.estimation.kept import CONFIG, Estimates, find_estimates, read_object, settings_of
from icl.storage.files import write_table
from icl.storage.locks import exclusive
from icl.subjects.digest import DIGEST
from icl.subjects.regression import tasks_of
from icl.tasks import zero_predictor_loss
from icl.tracking import read_metrics

SAMPLER = "sampler_config"

Parts = list[tuple[LLCConfig, pd.DataFrame]]
"""Rows of runs; each part has the settings with which its rows were made."""

SUBJECT_SETTINGS = "subject_config."

ESTIMATES = ("llc", "llc_calibrated")
"""The tables of estimates that give stages: `llc` (published sampler settings) and `llc_calibrated` (calibrated ones)."""

OTHERS = ("metrics", "losses", "evals", "stages", "boundaries")
"""Tables of a folder that are not estimates, so that estimates cannot have their names."""

LAWS = ("grad_tasks", "eval_tasks")
"""The settings that name the distributions of the data of an estimate."""


def tabulate(
    configs: Sequence[LLCConfig], results: Path, output: Path, name: str = "llc", preset: str | None = None
) -> list[Path]:
    """Write tables of the results of a sweep's runs. After an error no table is written.

    - `<name>.csv` has one row per run and checkpoint, with the columns of `LLCResult.summary`, `chains` (the number of chains), and
      `loss/zero` (the loss of predicting 0).
    - `<name>_traces.csv.gz` has the loss and distance of the chains along their draws, thinned.
    - `metrics.csv` has what training logged. It is not written if the folder has `evals.csv` from `icl analyse`.

    The first columns of each table tell the runs apart: `model_seed`, or the settings of another subject (`subject_config.<name>`), then
    every setting that varies in the sweep, under its dotted name, such as `optimizer_config.lr`. Then comes `step`. A JSON file beside each
    table holds the settings that all its rows share.

    All stored estimates of the runs count, whichever checkpoints were chosen (`find_estimates`). Runs without results are left out; a later
    call adds their rows. Sweeps that differ only in the number of chains may share one table. If a checkpoint has several estimates, the
    table keeps the one with the most chains, and of equals the last.

    Args:
        configs: the grid points of the sweep.
        results: the folder that holds the results folders of all runs.
        output: the folder for the tables.
        name: the name of the table of estimates.
        preset: the name of the sampler settings to tabulate; None: those of the sweep.

    Raises:
        ConfigError: the name is that of another table, or the table of this name on disk is no table of estimates; no run of
            the sweep has estimates or metrics; the estimates are under several settings; or the stored settings do not match a
            folder's name.
        ValueError: the table on disk was made with other settings.
        RunInUseError: another process writes to the folder.
    """
    if name in OTHERS:
        raise ConfigError(f"--name {name} is the name of another table of a folder; take another, such as llc_{name}")
    found = find_estimates(configs, results, preset)
    logged = [] if (output / "evals.csv").exists() else _logged(configs, results)
    if not found and (preset or not logged):
        under = f" under the preset {preset}" if preset else ""
        raise ConfigError(f"no run of this sweep has estimates{under} in {results}; make them with `icl llc` first")
    keys = keys_of_sweep(configs)
    tables: list[RunTable] = []
    with exclusive(output / ".lock", f"the folder {output}"):
        if found:
            estimates, traces = _best(found, keys)
            tables += _joined_estimates(
                _table(output / f"{name}.csv", keys, estimates), _table(output / f"{name}_traces.csv.gz", keys, traces)
            )
        if logged:
            of_training = [key for key in keys if not key.startswith(SAMPLER)]
            tables.append(_joined_metrics(_table(output / "metrics.csv", of_training, logged).without(SAMPLER)))
        write_run_tables([table for table in tables if len(table.rows)])
    return [table.path for table in tables if len(table.rows)]


def write_stages(folder: Path) -> list[Path]:
    """Derive `stages.csv` and `boundaries.csv` from the tables `evals`, `llc` and `llc_calibrated` of a folder.

    Both begin with the columns `model_seed` and `setting` (the name of the table of estimates). `stages.csv` goes on with
    the columns of `icl.analysis.stages.stage_table`, for the published stages that the run has reached. `boundaries.csv`
    goes on with those of `boundary_table`. Estimates and losses that are not finite are left out, and then runs with fewer than eight
    estimates. An estimate without a standard error gets the largest of its run.

    Raises:
        ValueError: the table of evaluations is missing, or no run has enough estimates.
    """
    evals = _needed(folder, "evals")
    stages, boundaries = [], []
    for setting in ESTIMATES:
        path = folder / f"{setting}.csv"
        if not path.is_file():
            continue
        if others := set(keys_of(read_table(path))) - {SEED_COLUMN}:
            raise ValueError(
                f"{path} has runs that differ in {', '.join(sorted(others))}, not only in their seeds; `icl figures --data {folder}` "
                "finds the stages of each run"
            )
        joined = read_table(path).merge(evals[["model_seed", "step", "pretrain/mse"]], on=["model_seed", "step"])
        for seed, all_rows in joined.groupby("model_seed"):
            run = detectable(all_rows, "pretrain/mse")
            if len(run) < FEWEST_ESTIMATES:
                continue
            steps, loss, llc, error = (run[name] for name in ("step", "pretrain/mse", "llc/mean", "llc/mcse"))
            # The last checkpoint is one step short of the nominal end of training.
            ends = {stage: end for stage, end in PUBLISHED_STAGE_ENDS.items() if steps.min() < end <= steps.max() + 1}
            keys = {"model_seed": seed, "setting": setting}
            stages.append(stage_table(ends, steps, loss, llc, error).assign(**keys))
            boundaries.append(boundary_table(find_boundaries(steps, llc, error)).assign(**keys))
    if not stages:
        raise ValueError(
            f"no run in {folder} has {FEWEST_ESTIMATES} estimates or more; make them with `icl llc` and `icl tabulate`"
        )
    written = {folder / "stages.csv": stages, folder / "boundaries.csv": boundaries}
    for path, tables in written.items():
        write_table(_first(pd.concat(tables, ignore_index=True), ["model_seed", "setting"]), path)
    return list(written)


def _first(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(table, columns=pd.Index([*columns, *(name for name in table.columns if name not in columns)]))


def keys_of_sweep(configs: Sequence[LLCConfig]) -> list[str]:
    """The columns that tell the runs of a sweep apart: the model's seed or the other subject's settings, then all settings that vary."""
    settings = [settings_of(config) for config in configs]
    names = dict.fromkeys(name for each in settings for name in dotted(each))
    first = [name for name in names if name == SEED or name.startswith(SUBJECT_SETTINGS)]
    return [column_of(setting) for setting in dict.fromkeys([*first, *varying(settings)])]


def _logged(configs: Sequence[LLCConfig], results: Path) -> Parts:
    """The training metrics of each run of the sweep that has any."""
    found: Parts = []
    for name, config in {config.training.name: config for config in configs if config.is_regression}.items():
        rows = pd.DataFrame(read_metrics(results / name))
        if len(rows):
            found.append((config.of(config.training.with_kept_seed(read_object(results / name / CONFIG))), rows))
    return found


def _best(found: Sequence[tuple[LLCConfig, Estimates]], keys: Sequence[str]) -> tuple[Parts, Parts]:
    """Estimates and traces, one per run and step: the one with the most chains, and of equals the last.

    Raises:
        ConfigError: two estimates of a step are of different weights.
    """
    tables = [(made, each.rows, each.traces) for made, each in found]
    best: dict[RunStep, int] = {}
    seen: dict[RunStep, tuple[str, str]] = {}
    for index, (made, rows, _) in enumerate(tables):
        digests = rows[DIGEST] if DIGEST in rows else [None] * len(rows)
        for step, digest in zip(rows["step"], digests, strict=True):
            at = label_of(_values(made, keys)), int(step)
            name = found[index][1].name
            if isinstance(digest, str) and (other := seen.setdefault(at, (digest, name)))[0] != digest:
                raise ConfigError(
                    f"{other[1]} and {name} are estimates of different weights at step {step}; delete the older of the two with: icl "
                    "runs delete NAME"
                )
            before = tables[best.get(at, index)][0].sampler_config.num_chains
            if made.sampler_config.num_chains >= before:
                best[at] = index
    estimates: Parts = []
    traces: Parts = []
    for index, (made, rows, course) in enumerate(tables):
        steps = [step for (_, step), winner in best.items() if winner == index]
        rows = rows.assign(chains=made.sampler_config.num_chains)
        if made.is_regression:
            rows["loss/zero"] = zero_predictor_loss(tasks_of(made.training, made.eval_tasks or made.grad_tasks))
        estimates.append((made, rows.loc[rows["step"].isin(steps)]))
        traces.append((made, course.loc[course["step"].isin(steps)] if len(course) else course))
    return estimates, traces


def _values(config: LLCConfig, keys: Sequence[str]) -> dict[str, Any]:
    """The values of a run in the columns that tell runs apart.

    Raises:
        ConfigError: its seed is not known.
    """
    values = values_of(settings_of(config), keys)
    if SEED_COLUMN in values and values[SEED_COLUMN] is None:
        raise ConfigError(f"{config.name} has no stored model_seed, and the sweep has none either; set the seed")
    return values


def _table(path: Path, keys: Sequence[str], parts: Parts) -> RunTable:
    """The rows of all runs. The settings that tell the runs apart are the first columns."""
    tables: list[pd.DataFrame] = []
    runs, shared = {}, {}
    for config, rows in parts:
        values = _values(config, keys)
        runs[label_of(values)] = config.subject_name
        shared = without(_shared(config), [setting_of(key) for key in keys])
        if len(rows):
            rest = [column for column in rows.columns if column != "step"]
            tables.append(pd.DataFrame({**values, "step": rows["step"], **{column: rows[column] for column in rest}}))
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=pd.Index([*keys, "step"]))
    return RunTable(path, tuple(keys), rows, shared, runs)


def _joined_estimates(estimates: RunTable, traces: RunTable) -> list[RunTable]:
    """Both tables, joined to those on disk. If a checkpoint has two estimates, the one with the most chains stays."""
    old, old_traces = (_with_laws(read_run_table(table.path)) for table in (estimates, traces))
    if old is not None and "chains" not in old.rows:
        raise ConfigError(f"{estimates.path} is no table of estimates; choose another --name or output folder")
    keys = list(dict.fromkeys([*(old.keys if old else ()), *estimates.keys]))
    estimates, traces = estimates.widened(keys), traces.widened(keys)
    if old is None:
        return [estimates, traces]
    old, old_traces = old.widened(keys), old_traces and old_traces.widened(keys)
    now = dict(zip(estimates.run_steps(), estimates.rows["chains"], strict=True))
    kept = {at for at, chains in zip(old.run_steps(), old.rows["chains"], strict=True) if chains > now.get(at, 0)}
    return [estimates.joined_to(old, kept), traces.joined_to(old_traces, kept)]


def _with_laws(table: RunTable | None) -> RunTable | None:
    """An older table of regression runs does not record `LAWS`; its rows were made with the default values."""
    if table is None or "task_config" not in table.settings:
        return table
    return replace(table, settings={**LLCConfig().model_dump(mode="json", include=set(LAWS)), **table.settings})


def _joined_metrics(metrics: RunTable) -> RunTable:
    """The table, joined to the rows of other runs on disk."""
    old = read_run_table(metrics.path)
    if old is None:
        return metrics
    keys = list(dict.fromkeys([*old.keys, *metrics.keys]))
    old, metrics = old.widened(keys), metrics.widened(keys)
    new = {run for run, _ in metrics.run_steps()}
    return metrics.joined_to(old, {at for at in old.run_steps() if at[0] not in new})


def _shared(config: LLCConfig) -> dict[str, Any]:
    """The settings that all rows of a table must share: all but the seeds, the checkpoints, the number of chains, cores and memory.

    The version of icl is added.
    """
    if config.is_regression:
        kept = config.training.decisive(
            "task_config", "num_steps", "batch_size", "optimizer_config", "scheduler_config"
        )
        for seed in ("model_seed", "pretrain_seed", "true_seed", "sampling_seed"):
            kept["task_config"].pop(seed, None)
        kept |= config.model_dump(mode="json", include=set(LAWS))
    else:
        kept = {"subject": config.subject, "subject_config": dict(config.subject_config)}
    kept["sampler_config"] = config.sampler_config.decisive()
    for name in ("num_chains", "cores", "max_memory_bytes"):
        kept["sampler_config"].pop(name, None)
    return {**kept, "icl_version": __version__}


def _needed(folder: Path, name: str) -> pd.DataFrame:
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise ValueError(f"{path} is missing; make it with: icl analyse RUN --only {name} --output {folder}")
    return read_table(path)
