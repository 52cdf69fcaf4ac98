"""Tables of several runs: first the settings that tell the runs apart (the keys), then `step`, then the quantities.

The keys say to which run a row belongs. A JSON file beside a table holds the settings that all its rows share, and the
name of the run for each combination of key values. Rows can be added to a table later. If a shared setting differs in the
new rows, it becomes a key, a column of all rows.
"""

import contextlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from icl.analysis.reading import beside, read_rows, read_settings
from icl.config.settings import dotted
from icl.storage.files import replacing, table_bytes
from icl.subjects.digest import DIGEST

SEED, SEED_COLUMN = "task_config.model_seed", "model_seed"
"""The one setting whose column is not its dotted name."""

RunStep = tuple[str, int]
"""A run, given by the text of its key values (`label_of`), and a step."""


@dataclass(frozen=True)
class RunTable:
    """One table.

    Attributes:
        path: the CSV file. It is compressed if its name ends in `.gz`.
        keys: the columns that tell runs apart, in order.
        rows: all rows. The keys are the first columns, then comes `step`.
        settings: the settings that all rows share, as plain nested data.
        runs: text of the key values -> name of the run.
    """

    path: Path
    keys: tuple[str, ...]
    rows: pd.DataFrame
    settings: Mapping[str, Any]
    runs: Mapping[str, str] = field(default_factory=dict)

    def run_steps(self) -> list[RunStep]:
        """Run and step of each row."""
        keys = self.rows[list(self.keys)].itertuples(index=False, name=None)
        labels = [label_of(dict(zip(self.keys, row, strict=True))) for row in keys] or [""] * len(self.rows)
        return list(zip(labels, (int(step) for step in self.rows["step"]), strict=True))

    def digests(self) -> dict[RunStep, str]:
        """Run and step -> digest of the weights that the rows are about (`icl.subjects.digest`), where the table has it."""
        if DIGEST not in self.rows.columns:
            return {}
        pairs = zip(self.run_steps(), self.rows[DIGEST], strict=True)
        return {at: digest for at, digest in pairs if isinstance(digest, str)}

    def widened(self, keys: Sequence[str]) -> "RunTable":
        """The table with these keys. Shared settings among them become columns.

        Raises:
            ValueError: the value of a new key is not known.
        """
        shared, new = dotted(self.settings), [key for key in keys if key not in self.keys]
        for key in new:
            if setting_of(key) not in shared:
                raise ValueError(
                    f"{self.path} does not record {key}, which varies in this sweep; move it away, or choose another --name or "
                    "output folder"
                )
        values = values_of(self.settings, new)
        rows = self.rows[list(self.keys)].drop_duplicates().itertuples(index=False, name=None)
        combinations = [dict(zip(self.keys, row, strict=True)) for row in rows] if self.keys else [{}]
        wider = {label_of(each): label_of({key: {**each, **values}[key] for key in keys}) for each in combinations}
        return RunTable(
            self.path,
            tuple(keys),
            _columns_first(self.rows.assign(**values), keys),
            without(self.settings, [setting_of(key) for key in keys]),
            {wider[label]: run for label, run in self.runs.items() if label in wider},
        )

    def without(self, setting: str) -> "RunTable":
        """The table without a shared setting."""
        return replace(self, settings=without(self.settings, [setting]))

    def joined_to(self, old: "RunTable | None", kept: Collection[RunStep]) -> "RunTable":
        """This table joined to an older one with the same keys (`widened`).

        Args:
            old: the older table, or None.
            kept: runs and steps for which the old rows are kept. For all others the new rows are taken.

        Raises:
            ValueError: their shared settings differ, one combination of key values means two different runs, or a step's rows are about
                different weights.
        """
        if old is None:
            return self
        if difference := _difference(old.settings, self.settings):
            raise ValueError(
                f"{self.path} was made with {difference}; move it away, or choose another --name or output folder"
            )
        for label, run in self.runs.items():
            if old.runs.get(label, run) != run:
                raise ValueError(
                    f"{self.path} has {' and '.join(self.keys)} {label} from the run {old.runs[label]}, not {run}; choose another "
                    "output folder for this run"
                )
        digests, before = self.digests(), old.digests()
        if changed := [step for (run, step), digest in digests.items() if before.get((run, step), digest) != digest]:
            raise ValueError(
                f"{self.path} has step {changed[0]} at other weights than these; move it away, or choose another --name or output folder"
            )
        parts = [
            old.rows[[each in kept for each in old.run_steps()]],
            self.rows[[each not in kept for each in self.run_steps()]],
        ]
        # The columns are in the order of the wider table, so that writing a second time changes nothing.
        columns = max(old.rows.columns, self.rows.columns, key=len)
        rows = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        rest = [name for name in rows.columns if name not in set(columns)]
        rows = pd.DataFrame(rows, columns=pd.Index([*columns, *rest]))
        return replace(self, rows=rows, settings=old.settings, runs={**old.runs, **self.runs})


def read_run_table(path: Path) -> RunTable | None:
    """The table on disk, or None.

    Raises:
        ValueError: the table cannot be read, or its settings are missing.
    """
    if not path.exists():
        return None
    settings, runs = read_settings(path)
    rows = read_rows(path)
    if "step" not in rows.columns:
        raise ValueError(f"{path} has no column step; it is not a table of runs")
    return RunTable(path, keys_of(rows), rows, settings, runs)


def write_run_tables(tables: Sequence[RunTable]) -> None:
    """Write tables and the files beside them. No file is replaced before all new ones are on the disk."""
    contents: dict[Path, bytes] = {}
    for table in tables:
        rows = table.rows.sort_values(by=[*table.keys, "step"], kind="stable", ignore_index=True)
        contents[table.path] = table_bytes(rows, table.path)
        about = {**table.settings, "runs": dict(table.runs)}
        contents[beside(table.path)] = (json.dumps(about, indent=1, sort_keys=True) + "\n").encode()
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            file = stack.enter_context(replacing(path))
            file.write(content)
            file.flush()


def keys_of(rows: pd.DataFrame) -> tuple[str, ...]:
    """The keys of a table: the columns before `step`."""
    columns = [str(name) for name in rows.columns]
    return tuple(columns[: columns.index("step")]) if "step" in columns else ()


def column_of(setting: str) -> str:
    """The column of a setting: its dotted name, or `model_seed` for the model's seed."""
    return SEED_COLUMN if setting == SEED else setting


def setting_of(column: str) -> str:
    """The dotted name of the setting in a column."""
    return SEED if column == SEED_COLUMN else column


def values_of(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A run's values of the keys, from its settings as plain nested data. A list is a text."""
    flat = dotted(settings)
    found = {key: flat.get(setting_of(key)) for key in keys}
    return {key: json.dumps(value) if isinstance(value, list | tuple) else value for key, value in found.items()}


def label_of(values: Mapping[str, Any]) -> str:
    """The key values as text: `7` if the model's seed is the only key, otherwise like `model_seed=7, optimizer_config.lr=0.003`."""
    plain = {key: plain_text(value) for key, value in values.items()}
    if list(plain) == [SEED_COLUMN]:
        return plain[SEED_COLUMN]
    return ", ".join(f"{key}={value}" for key, value in plain.items())


def plain_text(value: Any) -> str:
    """A value as text. It is the same before the value is written to a CSV file and after it is read back."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value != value:
        return "none"
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.7g}"
    return str(value)


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, as "key=1, not 2". A setting that the older table does not record is not compared."""
    known = {key: now[key] for key in now if key in then}
    old, new = dotted(then), dotted(known)
    differing = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
    return f"{differing[0]}={old.get(differing[0])!r}, not {new.get(differing[0])!r}" if differing else ""


def without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Nested settings without those with these dotted names."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        inner = [name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")]
        if key not in names:
            kept[key] = without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def _columns_first(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    first = [*keys, "step"]
    return pd.DataFrame(rows, columns=pd.Index([*first, *(name for name in rows.columns if name not in first)]))
