"""Long tables of several runs: one column for each setting that tells the runs apart, then `step`, then the quantities.

The columns before `step` say which run a row is of. Beside a table lies a JSON file with the settings that its rows
share, and the run of each combination of the others. Rows that are added to a table join those it has; a setting that
begins to vary becomes a column of all rows.
"""

import contextlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from icl.config.settings import dotted
from icl.storage.files import replacing, table_bytes

SEED, SEED_COLUMN = "task_config.model_seed", "model_seed"
"""The one setting whose column is not its dotted name."""

RunStep = tuple[str, int]
"""A run, by the text of its keys' values (`label_of`), and a step of it."""


@dataclass(frozen=True)
class RunTable:
    """One table.

    Attributes:
        path: the CSV file; a name in `.gz` is compressed.
        keys: the columns that tell runs apart, in order.
        rows: all rows; the keys are the first columns, then comes `step`.
        settings: plain nested data that all rows share.
        runs: text of the keys' values -> name of the run.
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

    def widened(self, keys: Sequence[str]) -> "RunTable":
        """The same with these keys: settings that all its rows share become columns.

        Raises:
            ValueError: it is not known what one of them was.
        """
        told, new = dotted(self.settings), [key for key in keys if key not in self.keys]
        for key in new:
            if setting_of(key) not in told:
                raise ValueError(
                    f"{self.path} does not say its {key}, which varies in this sweep; move it away, or choose another --name or "
                    "output folder"
                )
        values = {key: told[setting_of(key)] for key in new}
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
        """The same where the rows say nothing of a setting."""
        return replace(self, settings=without(self.settings, [setting]))

    def joined_to(self, old: "RunTable | None", kept: Collection[RunStep]) -> "RunTable":
        """The old rows that are kept, and of the new ones all others. Both have the same keys (`widened`).

        Raises:
            ValueError: the two share settings that differ, or a run of one has the keys of another run of the other.
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
        parts = [
            old.rows[[each in kept for each in old.run_steps()]],
            self.rows[[each not in kept for each in self.run_steps()]],
        ]
        # As the wider table has them, so that a second writing changes nothing.
        columns = max(old.rows.columns, self.rows.columns, key=len)
        rows = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        rest = [name for name in rows.columns if name not in set(columns)]
        rows = pd.DataFrame(rows, columns=pd.Index([*columns, *rest]))
        return replace(self, rows=rows, settings=old.settings, runs={**old.runs, **self.runs})


def read_run_table(path: Path) -> RunTable | None:
    """The table on disk, or None.

    Raises:
        ValueError: it cannot be read, or nothing says what made it.
    """
    if not path.exists():
        return None
    beside = _beside(path)
    try:
        settings, rows = json.loads(beside.read_text()), pd.read_csv(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} has no readable settings in {beside.name} ({error}); move the table away, or choose another output folder"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, EOFError) as error:
        raise ValueError(f"{path} is not a readable table ({error}); delete it to make it again") from error
    if "step" not in rows.columns:
        raise ValueError(f"{path} has no column step; it is not a table of runs")
    runs = settings.pop("runs", {})
    return RunTable(path, keys_of(rows), rows, settings, runs)


def write_run_tables(tables: Sequence[RunTable]) -> None:
    """Write tables and the files beside them, all or none: no file takes its name before all are on the disk."""
    contents: dict[Path, bytes] = {}
    for table in tables:
        rows = table.rows.sort_values(by=[*table.keys, "step"], kind="stable", ignore_index=True)
        contents[table.path] = table_bytes(rows, table.path)
        about = {**table.settings, "runs": dict(table.runs)}
        contents[_beside(table.path)] = (json.dumps(about, indent=1, sort_keys=True) + "\n").encode()
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            file = stack.enter_context(replacing(path))
            file.write(content)
            file.flush()


def keys_of(rows: pd.DataFrame) -> tuple[str, ...]:
    """The columns that tell the runs of a table apart: those before `step`."""
    columns = [str(name) for name in rows.columns]
    return tuple(columns[: columns.index("step")]) if "step" in columns else ()


def column_of(setting: str) -> str:
    """The column of a setting: its dotted name, or `model_seed` for that of the model."""
    return SEED_COLUMN if setting == SEED else setting


def setting_of(column: str) -> str:
    """The dotted name of the setting in a column."""
    return SEED if column == SEED_COLUMN else column


def label_of(values: Mapping[str, Any]) -> str:
    """The values of the keys as text: `7` for a seed alone, else `model_seed=7, optimizer_config.lr=0.003`."""
    plain = {key: plain_text(value) for key, value in values.items()}
    if list(plain) == [SEED_COLUMN]:
        return plain[SEED_COLUMN]
    return ", ".join(f"{key}={value}" for key, value in plain.items())


def plain_text(value: Any) -> str:
    """A value as text, the same before it goes into a CSV file and after."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value != value:
        return "none"
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.7g}"
    return str(value)


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, as "key=1, not 2"; what an older table does not record is no difference."""
    known = {key: now[key] for key in now if key in then}
    old, new = dotted(then), dotted(known)
    differing = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
    return f"{differing[0]}={old.get(differing[0])!r}, not {new.get(differing[0])!r}" if differing else ""


def without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Nested settings less those of these dotted names."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        inner = [name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")]
        if key not in names:
            kept[key] = without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def _columns_first(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    first = [*keys, "step"]
    return pd.DataFrame(rows, columns=pd.Index([*first, *(name for name in rows.columns if name not in first)]))


def _beside(path: Path) -> Path:
    """The JSON file beside a table."""
    return path.with_name(path.name.split(".")[0] + ".json")
