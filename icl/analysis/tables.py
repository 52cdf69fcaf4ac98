"""Tables of analyses on disk: CSV files that grow by whole checkpoints and are written atomically.

A table holds rows of any number of runs, and any number of rows per run and step. The column `model_seed` tells the runs apart, or
another column such as `num_tasks` if the runs have the same seed. A JSON file of the same name beside the table holds the settings
and the version of the library with which its rows were made. Rows with other settings are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from icl.analysis.reading import beside, read_rows, read_settings
from icl.storage.files import write_atomically, write_table

RUN = "model_seed"
"""The column that tells runs apart, unless another one is given."""


class AnalysisTable:
    """One table on disk, to which rows can be added.

    Attributes:
        path: the CSV file. It is compressed if its name ends in `.gz`.
        key: the column that tells runs apart. The argument `run` of a method is a value in it.
        rows: all written rows, sorted by run and step.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], key: str = RUN) -> None:
        """Open a table, or make an empty one.

        Raises:
            ValueError: the file on disk is not such a table, or was made with other settings.
        """
        self.path = path
        self.key = key
        self._settings = json.loads(json.dumps(settings, sort_keys=True))
        self._new: list[pd.DataFrame] = []
        self.rows = pd.DataFrame(columns=pd.Index([key, "step"]))
        if path.exists():
            self._settings["runs"] = self._checked_runs()
            self.rows = read_table(path, key)

    @property
    def settings_path(self) -> Path:
        """The JSON file beside the table."""
        return beside(self.path)

    def steps(self, run: float) -> set[int]:
        """The steps of a run in the table, including those that are not written yet."""
        known = {int(step) for step in self.rows.loc[self.rows[self.key] == run, "step"]}
        return known | {int(part["step"].iloc[0]) for part in self._new if part[self.key].iloc[0] == run}

    def begin_run(self, run: float, run_name: str) -> None:
        """Record the name of the run for a value of the key.

        Raises:
            ValueError: the table has rows with this value from another run.
        """
        known = self._settings.setdefault("runs", {}).setdefault(str(run), run_name)
        if known != run_name:
            raise ValueError(
                f"{self.path} has {self.key} {run} from the run {known}, not {run_name}; "
                "choose another output folder for this run"
            )

    def add(self, run: float, step: int, rows: pd.DataFrame) -> None:
        """Add the rows of one checkpoint. `write` writes them to the disk."""
        part = rows.copy()
        part.insert(0, "step", step)
        part.insert(0, self.key, run)
        self._new.append(part)

    def replace_run(self, run: float, rows: pd.DataFrame) -> None:
        """Replace all rows of a run by others, which have a column `step`. `write` writes them to the disk."""
        self.rows = self.rows.loc[self.rows[self.key] != run]
        part = rows.copy()
        part.insert(0, self.key, run)
        self._new.append(part)

    def write(self) -> None:
        """Write all rows to the disk atomically, sorted by run and step."""
        if not self._new:
            return
        old = [self.rows] if len(self.rows) else []
        rows = pd.DataFrame(pd.concat([*old, *self._new], ignore_index=True))
        self.rows = rows.sort_values(by=[self.key, "step"], kind="stable", ignore_index=True)
        self._new = []
        write_table(self.rows, self.path)
        write_atomically(self.settings_path, (json.dumps(self._settings, indent=1, sort_keys=True) + "\n").encode())

    def _checked_runs(self) -> dict[str, str]:
        """The runs of the table on disk, after checking that its settings equal those of this table."""
        stored, runs = read_settings(self.path)
        differing = sorted(key for key in {*stored, *self._settings} if stored.get(key) != self._settings.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"{self.path} was made with {key}={stored.get(key)!r}, not {self._settings.get(key)!r}; "
                "move it away, or choose another output folder"
            )
        return runs


def read_table(path: Path, key: str = RUN) -> pd.DataFrame:
    """Read a table of analyses.

    Raises:
        ValueError: see `icl.analysis.reading.read_rows`; or the table has no columns `key` and `step`.
    """
    table = read_rows(path)
    if not {key, "step"} <= set(table.columns):
        raise ValueError(f"{path} has no columns {key} and step; it is not a table of an analysis")
    return table
