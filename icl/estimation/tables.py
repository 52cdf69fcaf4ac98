"""Tables of learning coefficients: from what `icl llc` left in its results folder, and the stages they show."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from icl import __version__
from icl.analysis.stages import PUBLISHED_STAGE_ENDS, boundary_table, find_boundaries, stage_table
from icl.analysis.tables import AnalysisTable, read_table
from icl.config import ConfigError
from icl.estimation.config import LLCConfig
from icl.estimation.traces import read_estimates, read_traces
from icl.storage.files import read_file, write_table
from icl.storage.jsonl import parse_object
from icl.tasks import zero_predictor_loss

CONFIG = "config.json"
ESTIMATES = ("llc", "llc_calibrated")
"""Tables of estimates that the stages are read from: under the published settings, and under calibrated ones."""

FEWEST_ESTIMATES = 8
"""That the detector of boundaries needs."""


def tabulate(configs: Sequence[LLCConfig], results: Path, output: Path, name: str = "llc") -> list[Path]:
    """Collect the estimates of a sweep in `<name>.csv`, and the loss of their chains along the draws in `<name>_traces.csv.gz`.

    One row per run and checkpoint, with the columns of `LLCResult.summary`, `chains`, the number of chains, and
    `loss/zero`, the loss of predicting 0. Runs of the sweep without results yet are left out; called again, their rows
    come in. Sweeps that differ only in the number of chains may share one table. Of several estimates at one checkpoint the
    table keeps that with the most chains; of equals, the last. Beside each table lies a JSON file with the settings that it was
    made with.

    Args:
        configs: the grid points of the sweep.
        results: the folder of results folders.
        output: the folder of tables.
        name: of the table.

    Raises:
        ConfigError: no run of the sweep has estimates, or one was made with other settings.
        ValueError: the table on disk was made with other settings.
    """
    written: list[AnalysisTable] = []
    for config in configs:
        folder = results / config.name
        estimates, traces = pd.DataFrame(read_estimates(folder)), read_traces(folder)
        if estimates.empty:
            continue
        stored = parse_object(read_file(folder / CONFIG)) if (folder / CONFIG).exists() else None
        if stored is not None:
            config = config.of(config.training.with_kept_seed(stored))
            config.refuse_another(stored, f"what {folder} holds")
        seed = config.training.task_config.model_seed
        if seed is None:
            raise ConfigError(f"{folder} does not say its model_seed, and the sweep has none either; name the seed")
        estimates["chains"] = chains = config.sampler_config.num_chains
        estimates["loss/zero"] = zero_predictor_loss(config.training.task_config.resolved().pretrain_task())
        parts = {f"{name}.csv": estimates, f"{name}_traces.csv.gz": _trace_rows(traces)}
        tables = {file: AnalysisTable(output / file, _settings(config)) for file in parts}
        old = tables[f"{name}.csv"].rows_of(seed)
        stays = set(old["step"]) - set(estimates["step"])
        if len(old):
            stays |= set(old.loc[old["chains"] > chains, "step"])
        for file, rows in parts.items():
            table = tables[file]
            merged = _merged(table.rows_of(seed), rows, stays)
            if len(merged):
                table.begin_run(seed, config.training.name)
                table.replace_run(seed, merged)
                table.write()
                written.append(table)
    if not written:
        raise ConfigError(f"no run of this sweep has estimates under {results}; make them with `icl llc` first")
    return list(dict.fromkeys(table.path for table in written))


def write_stages(folder: Path) -> list[Path]:
    """Derive `stages.csv` and `boundaries.csv` from the tables `evals`, `llc` and `llc_calibrated` of a folder.

    Runs with fewer than eight estimates are left out.

    Both have the columns `model_seed` and `setting` (the table of estimates), then those of
    `icl.analysis.stages.stage_table` (with the published ends as far as the run goes) and `boundary_table`.

    Raises:
        ValueError: the table of evaluations is missing, or no run has enough estimates.
    """
    evals = _needed(folder, "evals")
    stages, boundaries = [], []
    for setting in ESTIMATES:
        path = folder / f"{setting}.csv"
        if not path.is_file():
            continue
        joined = read_table(path).merge(evals[["model_seed", "step", "pretrain/mse"]], on=["model_seed", "step"])
        for seed, run in joined.groupby("model_seed"):
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


def _merged(old: pd.DataFrame, new: pd.DataFrame, stays: set[int]) -> pd.DataFrame:
    """The old rows of the steps that stay, and the new ones of all others; columns as the wider table has them."""
    parts = [old.loc[old["step"].isin(list(stays))], new.loc[~new["step"].isin(list(stays))] if len(new) else new]
    columns = max(old.columns, new.columns, key=len)
    return pd.DataFrame(pd.concat([part for part in parts if len(part)] or [new], ignore_index=True), columns=columns)


def _trace_rows(traces: Sequence[dict]) -> pd.DataFrame:
    """One row per checkpoint, chain and point: `step`, `chain`, `draw`, `loss`, `distance`."""
    rows = [
        pd.DataFrame({"step": trace["step"], "chain": chain, "draw": trace["draw"], "loss": loss, "distance": distance})
        for trace in traces
        for chain, (loss, distance) in enumerate(zip(trace["loss"], trace["distance"], strict=True))
    ]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def _settings(config: LLCConfig) -> dict[str, object]:
    """What the rows of a table share: everything but the seeds, the choice of checkpoints, how many chains, and what cores and memory
    they may use."""
    kept = config.training.decisive("task_config", "num_steps", "batch_size")
    kept["sampler_config"] = config.sampler_config.decisive()
    for seed in ("model_seed", "pretrain_seed", "true_seed", "sampling_seed"):
        kept["task_config"].pop(seed, None)
    for name in ("num_chains", "cores", "max_memory_bytes"):
        kept["sampler_config"].pop(name, None)
    return {**kept, "icl_version": __version__}


def _needed(folder: Path, name: str) -> pd.DataFrame:
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise ValueError(f"{path} is missing; make it with: icl analyse RUN --only {name} --output {folder}")
    return read_table(path)
