"""Reads tables and the JSON files beside them. What is wrong with a file is one line that names it and says what to do."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from icl.storage.files import read_file
from icl.storage.jsonl import parse_object
from icl.subjects.digest import DIGEST

PLACES = ("model_seed", "step")
"""Columns of finite numbers. `num_tasks`, and columns with a slash such as `llc/mean`, hold any numbers."""


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a CSV file. It is compressed if its name ends in `.gz`.

    Raises:
        ValueError: the file is damaged, it cannot be read, or a text stands where a number belongs.
    """
    try:
        rows = pd.read_csv(path, dtype={DIGEST: str})  # a digest may look like a number
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a readable table ({reason}); delete it to make it again") from error
    for name in map(str, rows.columns):
        if name in (*PLACES, "num_tasks") or "/" in name:
            _refuse_other_than_numbers(path, name, pd.Series(rows[name]))
    return rows


def _refuse_other_than_numbers(path: Path, name: str, cells: pd.Series) -> None:
    values = pd.Series(pd.to_numeric(cells, errors="coerce"), index=cells.index).to_numpy(dtype=float)
    wrong = ~np.isfinite(values) if name in PLACES else np.isnan(values) & cells.notna().to_numpy()
    if wrong.any():
        line = int(wrong.argmax())
        raise ValueError(
            f"{path} is not a readable table (its line {line + 2} has {str(cells.iloc[line])[:40]!r} in the column {name}, not a number); "
            "delete it to make it again"
        )


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that are stored beside a table, and its runs: their label -> their name.

    Raises:
        ValueError: they cannot be read, or are no JSON object.
    """
    file = beside(path)
    try:
        settings, reason = parse_object(read_file(file)), "it holds no JSON object"
    except OSError as error:
        settings, reason = None, error.strerror or str(error)
    runs = {} if settings is None else settings.pop("runs", {})
    if settings is None or not isinstance(runs, dict):
        raise ValueError(
            f"{path} has no readable settings in {file.name} ({reason}); move the table away, or choose another output folder"
        )
    return settings, runs


def beside(path: Path) -> Path:
    """The JSON file beside a table."""
    return path.with_name(path.name.split(".")[0] + ".json")
