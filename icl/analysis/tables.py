"""Tables of analyses on disk: CSV files that grow by whole checkpoints and are never half written.

A table holds rows of any number of runs, told apart by `model_seed`, and any number of rows per (model_seed, step).
Beside it lies a JSON file of the same name that says with which settings and by which version of the library its rows
were made; rows of other settings are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from icl.storage.files import write_atomically, write_table

KEYS = ["model_seed", "step"]


class AnalysisTable:
    """One table: what is in it, and how rows are added.

    Attributes:
        path: the CSV file; a name in `.gz` is compressed.
        rows: all rows so far, by model seed and step.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or begin a table.

        Raises:
            ValueError: the file on disk is not such a table, or was made with other settings.
        """
        self.path = path
        self._settings = json.loads(json.dumps(settings, sort_keys=True))
        self._new: list[pd.DataFrame] = []
        self.rows = pd.DataFrame(columns=pd.Index(KEYS))
        if path.exists():
            self._settings["runs"] = self._checked_runs()
            self.rows = read_table(path)

    @property
    def settings_path(self) -> Path:
        """The JSON file beside the table."""
        return self.path.with_name(self.path.name.split(".")[0] + ".json")

    def steps(self, model_seed: int) -> set[int]:
        """The steps of a run that the table has, written or not."""
        known = {int(step) for step in self.rows.loc[self.rows["model_seed"] == model_seed, "step"]}
        return known | {int(part["step"].iloc[0]) for part in self._new if part["model_seed"].iloc[0] == model_seed}

    def rows_of(self, model_seed: int) -> pd.DataFrame:
        """The rows of a run that are on disk, without their `model_seed`."""
        return pd.DataFrame(self.rows.loc[self.rows["model_seed"] == model_seed].drop(columns="model_seed"))

    def begin_run(self, model_seed: int, run_name: str) -> None:
        """Say which run the rows of a seed come from.

        Raises:
            ValueError: the table has rows of this seed from another run.
        """
        known = self._settings.setdefault("runs", {}).setdefault(str(model_seed), run_name)
        if known != run_name:
            raise ValueError(
                f"{self.path} has model_seed {model_seed} from the run {known}, not {run_name}; "
                "choose another output folder for this run"
            )

    def add(self, model_seed: int, step: int, rows: pd.DataFrame) -> None:
        """Add the rows of one checkpoint; `write` makes them permanent."""
        part = rows.copy()
        part.insert(0, "step", step)
        part.insert(0, "model_seed", model_seed)
        self._new.append(part)

    def replace_run(self, model_seed: int, rows: pd.DataFrame) -> None:
        """Put rows, with their column `step`, in place of all rows of a run; `write` makes them permanent."""
        self.rows = self.rows.loc[self.rows["model_seed"] != model_seed]
        part = rows.copy()
        part.insert(0, "model_seed", model_seed)
        self._new.append(part)

    def write(self) -> None:
        """Put everything on disk, in order, by renaming a complete file over the old one."""
        if not self._new:
            return
        old = [self.rows] if len(self.rows) else []
        rows = pd.DataFrame(pd.concat([*old, *self._new], ignore_index=True))
        self.rows = rows.sort_values(by=KEYS, kind="stable", ignore_index=True)
        self._new = []
        write_table(self.rows, self.path)
        write_atomically(self.settings_path, (json.dumps(self._settings, indent=1, sort_keys=True) + "\n").encode())

    def _checked_runs(self) -> dict[str, str]:
        """The runs that the table on disk holds, after checking that its settings are ours."""
        try:
            stored = json.loads(self.settings_path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} has no readable settings in {self.settings_path.name} ({error}); "
                "move the table away, or choose another output folder"
            ) from error
        runs = stored.pop("runs", {})
        differing = sorted(key for key in {*stored, *self._settings} if stored.get(key) != self._settings.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"{self.path} was made with {key}={stored.get(key)!r}, not {self._settings.get(key)!r}; "
                "move it away, or choose another output folder"
            )
        return runs


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of analyses.

    Raises:
        ValueError: the file is not a CSV table with columns model_seed and step.
    """
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"{path} is not a readable table ({error}); delete it to make it again") from error
    if not set(KEYS) <= set(table.columns):
        raise ValueError(f"{path} has no columns {' and '.join(KEYS)}; it is not a table of an analysis")
    return table
