"""Run the analyses of any subject over its checkpoints, with one table per analysis. An interrupted call can be continued."""

import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from icl.analysis.essential_dynamics import pca, trajectory_table, write_rows
from icl.analysis.loss_on_data import SAMPLES, LossOnData
from icl.analysis.measures import OF_SUBJECTS
from icl.analysis.run import NUM_COMPONENTS, TRAJECTORY, Counter, Progress, table_path
from icl.analysis.run_tables import RunTable, label_of, read_run_table, setting_of, values_of, without, write_run_tables
from icl.config import ConfigError
from icl.sampling import SamplerConfig
from icl.storage.locks import exclusive
from icl.subjects import Subject
from icl.subjects.digest import DIGEST, weights_digest

SUBJECT_ANALYSES = (*OF_SUBJECTS, TRAJECTORY)
"""The analyses of any subject: those of single checkpoints (`measures.OF_SUBJECTS`), and the `trajectory` of its weights."""

_WRITE_EVERY_S = 30.0


@dataclass(frozen=True)
class Measured:
    """What is measured, and how its rows are told from others.

    Attributes:
        subject: the model along its checkpoints, its loss and its data.
        name: its name.
        settings: all settings that the rows of a table share or that tell them apart, as plain nested data.
        keys: the columns that tell subjects apart: dotted names of settings.
        sampler: how batches are ordered (`init_seed`, `independent_batches`).
    """

    subject: Subject
    name: str
    settings: Mapping[str, Any]
    keys: tuple[str, ...] = ()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


def analyse_subject(
    what: Measured,
    steps: Sequence[int],
    output: Path,
    only: Iterable[str] = SUBJECT_ANALYSES,
    *,
    samples: int = SAMPLES,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, note, total: None,
) -> dict[str, Path]:
    """Measure checkpoints of a subject and keep the tables in a folder: the keys, then `step`, then the quantities.

    - `evals.csv`: `loss/mean`, `weight/norm` (`icl.analysis.evaluations.measure_loss`).
    - `hessian.csv`: `hessian/evals/i`, `hessian/trace`, ... (`icl.analysis.hessian.hessian_table`).
    - `trajectory.csv`: `variant` (always "weights"), `pc/i`, `explained_variance_ratio/i` over the chosen checkpoints.

    Each row also has the digest of its weights. Checkpoints that are in a table already are not measured again. The trajectory is made
    again if its checkpoints change.

    Args:
        steps: the checkpoints.
        only: analyses to run, out of `SUBJECT_ANALYSES`.
        samples: the loss and the Hessian are those on the first batches that hold so many samples.

    Returns:
        Analysis -> file of its table.

    Raises:
        ConfigError: an analysis is unknown, or there are too few checkpoints for a trajectory, or they differ in size.
        ValueError: the subject's model, loss or data are wrong, or a table in the folder was made with other settings or at other weights.
        RunInUseError: another process writes to the folder.
    """
    names = list(dict.fromkeys(only))
    check_analyses(names)
    if TRAJECTORY in names and len(steps) < 2:
        raise ConfigError("a trajectory needs at least two checkpoints; choose other analyses with --only")
    settings = {**what.settings, "samples": samples}
    with exclusive(output / ".lock", f"the folder {output}"):
        tables = {name: _Growing.opened(table_path(output, name), what, settings) for name in names}
        _refuse_changed_weights(what.subject, tables.values(), steps)
        todo = {
            step: [name for name in OF_SUBJECTS if name in tables and step not in tables[name].steps] for step in steps
        }
        new_trajectory = TRAJECTORY in names and tables[TRAJECTORY].steps != set(steps)
        todo = {step: missing for step, missing in todo.items() if missing or new_trajectory}
        count = Counter(sum(len(missing) or 1 for missing in todo.values()), progress)

        digests: dict[int, str] = {}

        def measured_models() -> Iterator[nn.Module]:
            """Measure checkpoint by checkpoint, and give the model of each."""
            written = time.monotonic()
            for step, missing in todo.items():
                if not missing:
                    count.begin(f"weights at step {step}")
                model = what.subject.model(step).to(device)
                digests[step] = weights_digest(model)
                if missing:
                    at = LossOnData.of_subject(what.subject, step, model, what.sampler, samples, device)
                for name in missing:
                    count.begin(f"{name} at step {step}")
                    tables[name].add(OF_SUBJECTS[name](at).assign(step=step, **{DIGEST: digests[step]}))
                if time.monotonic() - written > _WRITE_EVERY_S:
                    _write(tables.values())
                    written = time.monotonic()
                yield model

        try:
            if new_trajectory:
                course = _trajectory(steps, measured_models(), output)
                tables[TRAJECTORY].replace(course.assign(**{DIGEST: [digests[step] for step in course["step"]]}))
            else:
                deque(measured_models(), maxlen=0)
        finally:
            _write(tables.values())
    count.finish()
    return {name: table_path(output, name) for name in names}


def check_analyses(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that is no analysis of any subject."""
    unknown = [name for name in names if name not in SUBJECT_ANALYSES]
    if unknown:
        raise ConfigError(f"there is no analysis {unknown[0]!r} of any subject; known: {', '.join(SUBJECT_ANALYSES)}")


class _Growing:
    """One table on disk, and the rows of one subject that are added to it."""

    def __init__(self, table: RunTable, values: Mapping[str, Any]) -> None:
        self.table, self._values = table, values
        self.changed = False

    @classmethod
    def opened(cls, path: Path, what: Measured, settings: Mapping[str, Any]) -> "_Growing":
        """The table with the rows that are there.

        Raises:
            ValueError: they were made with other settings.
        """
        old = read_run_table(path)
        keys = tuple(dict.fromkeys([*(old.keys if old else ()), *what.keys]))
        values = values_of(settings, keys)
        shared = without(settings, [setting_of(key) for key in keys])
        empty = pd.DataFrame(columns=pd.Index([*keys, "step"]))
        table = RunTable(path, keys, empty, shared, {label_of(values): what.name})
        old = old and old.widened(keys)
        return cls(table.joined_to(old, set(old.run_steps()) if old else ()), values)

    @property
    def steps(self) -> set[int]:
        """The checkpoints of the subject that it has."""
        own = label_of(self._values)
        return {step for label, step in self.table.run_steps() if label == own}

    @property
    def digests(self) -> dict[int, str]:
        """Checkpoint of the subject -> digest of the weights that were measured."""
        own = label_of(self._values)
        return {step: digest for (label, step), digest in self.table.digests().items() if label == own}

    def add(self, rows: pd.DataFrame) -> None:
        """Add rows, which have a column `step`."""
        first = pd.Index([*self.table.keys, "step"])
        columns = first.append(rows.columns.difference(first, sort=False))
        rows = pd.DataFrame(rows.assign(**self._values), columns=columns)
        old = [self.table.rows] if len(self.table.rows) else []
        self.table = replace(self.table, rows=pd.concat([*old, rows], ignore_index=True))
        self.changed = True

    def replace(self, rows: pd.DataFrame) -> None:
        """Put rows in the place of all that it has of the subject."""
        own = label_of(self._values)
        others = self.table.rows[[label != own for label, _ in self.table.run_steps()]]
        self.table = replace(self.table, rows=others)
        self.add(rows)


def _refuse_changed_weights(subject: Subject, tables: Iterable[_Growing], steps: Sequence[int]) -> None:
    """Raise `ValueError` if a table has one of these steps at other weights than the subject has now."""
    now: dict[int, str] = {}
    for table in tables:
        for step, digest in table.digests.items():
            if step not in steps:
                continue
            if step not in now:
                now[step] = weights_digest(subject.model(step))
            if now[step] != digest:
                raise ValueError(
                    f"{table.table.path} has step {step} at other weights than those of now; move the table away, or choose another "
                    "output folder"
                )


def _write(tables: Iterable[_Growing]) -> None:
    changed = [each for each in tables if each.changed]
    write_run_tables([each.table for each in changed])
    for each in changed:
        each.changed = False


def _trajectory(steps: Sequence[int], models: Iterator[nn.Module], folder: Path) -> pd.DataFrame:
    """Principal components of the weights along the checkpoints: `variant`, `step`, `pc/i`, `explained_variance_ratio/i`.

    Raises:
        ConfigError: the models differ in size.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".trajectory-") as place:
        matrix = write_rows(Path(place) / "rows.npy", _rows(steps, models), len(steps), "float32")
        fitted = pca(matrix, min(NUM_COMPONENTS, len(steps) - 1, matrix.shape[1]))
        del matrix
    shares = {f"explained_variance_ratio/{i}": share for i, share in enumerate(fitted.explained_variance_ratio)}
    return trajectory_table(list(steps), fitted.scores, variant="weights").assign(**shares)


def _rows(steps: Sequence[int], models: Iterator[nn.Module]) -> Iterator[NDArray[np.float32]]:
    """All parameters of each model as one vector."""
    first = None
    for step, model in zip(steps, models, strict=True):
        row = torch.cat([value.detach().reshape(-1).float().cpu() for value in model.parameters()]).numpy()
        first = row.size if first is None else first
        if row.size != first:
            raise ConfigError(
                f"the model has {first:,} parameters at step {steps[0]} and {row.size:,} at step {step}, so they have no trajectory; "
                "choose other checkpoints with --steps, or other analyses with --only"
            )
        yield row
