"""The tables of a family, and the commands that make them.

A family is a folder of tables, such as data/L2H4Minf with `evals.csv` or `evals.csv.gz`.
"""

import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from icl.analysis.measures import ONLY_OF_FAMILIES
from icl.analysis.run_tables import keys_of, plain_text

Tables = Mapping[str, pd.DataFrame]

COMMANDS = {
    "llc": "icl llc SWEEP, then icl tabulate SWEEP --output data/FAMILY",
    "llc_calibrated": "icl llc SWEEP, then icl tabulate SWEEP --name llc_calibrated --output data/FAMILY",
    "llc_long": "icl llc SWEEP, then icl tabulate SWEEP --name llc_long --output data/FAMILY",
    "stages": "icl stages data/FAMILY",
    "boundaries": "icl stages data/FAMILY",
}
"""The commands of tables that no analysis makes. Traces of chains come with their estimates."""


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


def read_tables(family: Path) -> dict[str, pd.DataFrame]:
    """All tables of a family by name."""
    return {name: read_table(family, name) for name in table_names(family)}


def read_table(family: Path, name: str) -> pd.DataFrame:
    """One table of a family.

    Raises:
        ValueError: it is not there; the message has the command that makes it.
    """
    for path in (family / f"{name}.csv", family / f"{name}.csv.gz"):
        if path.is_file():
            return pd.read_csv(path)
    raise ValueError(f"{family / name}.csv is missing; make it with: {command_for(name)}")


def seeds_of(tables: Tables) -> list[int]:
    """The model seeds that any table has."""
    found = (set(table["model_seed"]) for table in tables.values() if "model_seed" in table.columns)
    return sorted(int(seed) for seed in set().union(*found))


def tables_of_seed(tables: Tables, seed: int) -> dict[str, pd.DataFrame]:
    """The rows of one regression run, of every table that has any, in order of steps where there are steps."""
    return _rows_of(tables, {"model_seed": seed})


def tables_of_subjects(tables: Tables) -> dict[str, dict[str, pd.DataFrame]]:
    """The tables of each run of a subject other than the regression run, by a short name; empty where the estimates are of regression runs.

    The columns before `step` tell the runs apart.
    """
    llc = tables.get("llc")
    if llc is None or "model_seed" in llc.columns:
        return {}
    keys = list(keys_of(llc))
    rows = pd.DataFrame(llc[keys]).drop_duplicates().to_dict("records") if keys else [{}]
    return {_short(row): _rows_of(tables, row) for row in rows}


def _short(values: Mapping[Hashable, Any]) -> str:
    """As in "width-3-seed-0", for the name of a folder."""
    words = [f"{str(key).rpartition('.')[2]}-{plain_text(value)}" for key, value in values.items()]
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", "-".join(words))


def _rows_of(tables: Tables, values: Mapping[Hashable, Any]) -> dict[str, pd.DataFrame]:
    chosen = {}
    for name, table in tables.items():
        if not set(values) <= set(table.columns):
            continue
        rows = pd.DataFrame(table)
        for key, value in values.items():
            rows = pd.DataFrame(rows.loc[rows[key].isna() if pd.isna(value) else rows[key] == value])
        if "step" in rows.columns:
            rows = rows.sort_values("step", kind="stable")
        if len(rows):
            chosen[name] = rows if "step" in rows.columns else rows.reset_index(drop=True)
    return chosen
