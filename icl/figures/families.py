"""The tables of a family, and the commands that make them.

A family is a folder of tables, such as data/L2H4Minf with `evals.csv` or `evals.csv.gz`.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from icl.analysis.measures import ONLY_OF_FAMILIES
from icl.analysis.reading import read_rows
from icl.analysis.run_tables import SEED_COLUMN, keys_of, plain_text
from icl.storage.files import read_file
from icl.storage.jsonl import parse_object

logger = logging.getLogger(__name__)

Tables = Mapping[str, pd.DataFrame]

GRIDS = (
    "eps_temp_gamma", "eval_dataset_size", "eval_fixed_batch", "eval_minibatch", "eval_loss_fn", "non_minima", "non_exploration",
    "fixed_seed", "fresh_seeds",
)  # fmt: skip
"""The tables of the calibration grids (data/calibration)."""

RESTRICTED = ("restricted", "restricted_calibrated", "restricted_relative", "complement", "complement_calibrated")
"""The tables of groups of weights (`icl.figures.restricted`)."""

SETTINGS = ("llc_calibrated", "llc_calibrated_dense", "llc_long", "llc_relative", "llc_table_gamma", "gamma_spectrum")
"""The tables of estimates under other settings, or at more checkpoints, than those of `llc`."""

COMMANDS = {
    "llc": "icl llc SWEEP, then icl tabulate SWEEP --output data/FAMILY",
    **{
        name: f"icl llc SWEEP, then icl tabulate SWEEP --name {name} --output data/FAMILY"
        for name in (*SETTINGS, *RESTRICTED, *GRIDS)
    },
    "curvature": "python -m benchmarks.geometry.curvature",
    "losses": "icl tabulate SWEEP --output data/FAMILY",
    "metrics": "icl tabulate SWEEP --output data/FAMILY",
    "stages": "icl stages data/FAMILY",
    "boundaries": "icl stages data/FAMILY",
}
"""Table -> the commands that make it, for tables that no analysis makes. Traces are made with their estimates."""


PAPERS_STEPS = 500_000
PAPERS_MODEL = {
    "task_size": 4, "max_examples": 8, "num_tasks": "inf", "embed_size": 64, "mlp_size": 64, "num_heads": 4, "num_layers": 2,
}  # fmt: skip


def command_for(table: str) -> str:
    """The command that makes a table of a family."""
    if table in ONLY_OF_FAMILIES:
        return "icl analyse --family SWEEP --output data/FAMILY"
    return COMMANDS.get(table.removesuffix("_traces"), f"icl analyse RUN --only {table} --output data/FAMILY")


def table_names(family: Path) -> Iterator[str]:
    """The names of the tables in a folder."""
    for path in sorted(family.glob("*.csv*")):
        if path.name.endswith((".csv", ".csv.gz")):
            yield path.name.split(".csv")[0]


def read_tables(family: Path, report: Callable[[str], None] = logger.warning) -> dict[str, pd.DataFrame]:
    """All tables of a family by name, and in addition `losses`, the loss along each run.

    The losses come from the first of these tables that exists: the evaluations, the logged metrics, the estimates (L(w*)). Tables that
    tell the runs apart (`keys_of_runs`) come before others.
    A table that cannot be read is left out, and `report` is called with one line.
    """
    tables: dict[str, pd.DataFrame] = {}
    for name in table_names(family):
        try:
            tables[name] = read_table(family, name)
        except ValueError as error:
            report(f"without the table {name}: {error}")
    of = (("evals", "loss/mean"), ("metrics", "pretrain/mse"), ("llc", "loss/init"))
    found = [(name, column) for name, column in of if name in tables and column in tables[name].columns]
    unlike = unlike_the_runs(tables)
    for name, column in sorted(found, key=lambda each: each[0] in unlike)[:1]:
        rows = tables[name].dropna(subset=[column])
        tables["losses"] = rows if column == "loss/mean" else _losses(rows, column)
    return tables


def _losses(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return pd.DataFrame(rows[[*keys_of(rows), "step"]].assign(**{"loss/mean": rows[column]}))


def is_the_papers(family: Path) -> bool:
    """Whether a family is the linear-regression transformer of arXiv 2402.02364 (K = 8, Gaussian tasks, 500,000 steps), according to
    the settings stored with its tables."""
    for path in sorted(family.glob("*.json")):
        try:
            settings = parse_object(read_file(path)) or {}
        except OSError:
            continue
        task = settings.get("task_config")
        if isinstance(task, dict) and "num_steps" in settings:
            return settings["num_steps"] == PAPERS_STEPS and all(task.get(k) == v for k, v in PAPERS_MODEL.items())
    return False


def read_table(family: Path, name: str) -> pd.DataFrame:
    """One table of a family.

    Raises:
        ValueError: the table is missing or damaged; the message has the command that makes it, or says what to do.
    """
    for path in (family / f"{name}.csv", family / f"{name}.csv.gz"):
        if path.is_file():
            return read_rows(path)
    raise ValueError(f"{family / name}.csv is missing; make it with: {command_for(name)}")


def tables_of_seed(tables: Tables, seed: int) -> dict[str, pd.DataFrame]:
    """The rows with this model seed of every table that has any, sorted by step if there are steps."""
    chosen = {}
    for name, table in tables.items():
        if "model_seed" not in table.columns:
            continue
        rows = pd.DataFrame(table.loc[table["model_seed"] == seed])
        if "step" in rows.columns:
            rows = rows.sort_values("step", kind="stable")
        if len(rows):
            chosen[name] = rows if "step" in rows.columns else rows.reset_index(drop=True)
    return chosen


def keys_of_runs(tables: Tables) -> tuple[str, ...]:
    """The columns that tell the runs of a family apart: the most that any of its tables has."""
    return max((_run_keys(name, table) for name, table in tables.items()), key=len, default=())


def unlike_the_runs(tables: Tables) -> dict[str, tuple[str, ...]]:
    """The tables along training that have other keys than `keys_of_runs`, so that their rows belong to no single run; with their keys.

    They are in no figure of a run (`tables_of_run`).
    """
    keys = keys_of_runs(tables)
    if keys in ((), (SEED_COLUMN,)):
        return {}
    return {
        name: own
        for name, table in tables.items()
        if "step" in table.columns and name not in ONLY_OF_FAMILIES
        if (own := _run_keys(name, table)) and set(own) != set(keys)
    }


def runs_of(tables: Tables) -> list[dict[str, Any]]:
    """The runs in the tables. Each is given by its values in the columns that tell runs apart."""
    keys = keys_of_runs(tables)
    rows = [table[list(keys)] for name, table in tables.items() if keys and set(_run_keys(name, table)) == set(keys)]
    if not rows:
        alone = any(name.startswith("llc") or table.columns[:1].tolist() == ["step"] for name, table in tables.items())
        return [{}] if alone else []
    every = pd.DataFrame(pd.concat(rows, ignore_index=True).drop_duplicates())
    every = every.sort_values(by=list(keys), kind="stable", key=_sortable)
    return [dict(zip(keys, row, strict=True)) for row in every.itertuples(index=False, name=None)]


def _sortable(values: pd.Series) -> pd.Series:
    """Values of a setting, as texts if some are: a text and a number have no order."""
    return values if is_numeric_dtype(values) else values.map(plain_text)


def tables_of_run(tables: Tables, run: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The rows of one run of every table that has any, sorted by step if there are steps."""
    if list(run) == ["model_seed"]:
        return tables_of_seed(tables, int(run["model_seed"]))
    chosen = {}
    for name, table in tables.items():
        if set(_run_keys(name, table)) == set(run) and "step" in table.columns:
            kept = pd.Series(True, index=table.index)
            for key, value in run.items():
                kept &= table[key].isna() if value != value else table[key] == value
            if kept.any():
                chosen[name] = table.loc[kept].sort_values("step", kind="stable")
    return chosen


def run_label(run: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """A run as part of a folder's name, such as `seed-3` or `seed-3-lr-0.01`: its seed, and what differs among the runs.

    Runs whose names would be equal are numbered.
    """
    own = _plain_label(run, among)
    equal = [other for other in among if _plain_label(other, among) == own]
    return f"{own}-{equal.index(run) + 1}" if len(equal) > 1 else own


def _plain_label(run: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    parts = [
        f"{key.rpartition('.')[2].removeprefix('model_')}-{plain_text(value)}"
        for key, value in run.items()
        if key == SEED_COLUMN or len({plain_text(other[key]) for other in among}) > 1
    ]
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(parts)) or "run"


def _run_keys(name: str, table: pd.DataFrame) -> tuple[str, ...]:
    """The columns that tell the runs of a table apart. Other columns before `step` are no settings; tables of analyses have such."""
    if name in ONLY_OF_FAMILIES:
        return ()
    tabulated = name.startswith("llc") or name in ("metrics", "losses")
    return tuple(key for key in keys_of(table) if tabulated or key == SEED_COLUMN or key.startswith("subject"))
