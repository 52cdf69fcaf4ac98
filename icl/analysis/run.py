"""Run analyses over the checkpoints of a run: resumable, with progress, one table per analysis."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from icl import __version__
from icl.analysis.essential_dynamics import pca, trajectory_table, write_rows
from icl.analysis.measures import MEASURES, AnalysisData, DataSettings
from icl.analysis.tables import AnalysisTable
from icl.analysis.trajectories import gradient_row, output_row, weight_row
from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.locks import exclusive
from icl.model import InContextRegressionTransformer
from icl.settings import ConfigError

Progress = Callable[[int, str, int], None]
"""Called with (measurements done, what comes next, measurements in all); one analysis of one checkpoint is one."""

TRAJECTORY = "trajectory"
ANALYSES = (*MEASURES, TRAJECTORY)
"""Names that `only` may list: those of single checkpoints (`measures.MEASURES`), and `trajectory`."""

RowOf = Callable[[InContextRegressionTransformer, torch.Tensor, torch.Tensor], torch.Tensor]
TRAJECTORY_ROWS: Mapping[str, RowOf] = {
    "tokens": output_row,
    "predictions": partial(output_row, part="predictions"),
    "weights": lambda model, xs, ys: weight_row(dict(model.named_parameters())),
    "gradient": gradient_row,
}
NUM_COMPONENTS = 4
_LONG = ("attention", "layer_norm", "gain_sweep")  # many rows per checkpoint: compressed
_WRITE_EVERY_S = 30.0


def analyse(
    checkpoints: Checkpoints,
    output: Path,
    only: Iterable[str] = ANALYSES,
    *,
    steps: Sequence[int] | None = None,
    settings: DataSettings | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, note, total: None,
) -> dict[str, Path]:
    """Measure a run's checkpoints and keep the tables in a folder.

    Checkpoints that a table has already are not measured again, so a second call goes on where the first was stopped.
    Several seeds of one configuration may share the folder; their rows differ in `model_seed`. Each table has a JSON
    file beside it with what made it.

    Args:
        checkpoints: of one run, with the configuration that training stored beside them.
        output: the folder of the tables: `<analysis>.csv`, or `.csv.gz` for those with many rows per checkpoint.
        only: analyses to run, out of `ANALYSES`.
        steps: checkpoints to use; all by default.
        settings: which sequences to measure on.
        device: where models and sequences live.
        progress: called before every measurement and at the end; those that a table has already do not count.

    Returns:
        Analysis -> its table's file.

    Raises:
        ConfigError: an unknown analysis, no configuration or checkpoint, or steps that have no checkpoint.
        ValueError: a table in the folder was made with other settings.
        RunInUseError: another process writes to the folder.
    """
    names = list(dict.fromkeys(only))
    unknown = [name for name in names if name not in ANALYSES]
    if unknown:
        raise ConfigError(f"no analysis {unknown[0]!r}; there are: {', '.join(ANALYSES)}")
    config = _config_of(checkpoints)
    chosen = _chosen_steps(checkpoints, steps)
    data = AnalysisData(config, settings or DataSettings(), device)
    with exclusive(output / ".lock", f"the folder {output}"):
        tables = {name: AnalysisTable(table_path(output, name), _provenance(data)) for name in names}
        for table in tables.values():
            table.begin_run(_seed_of(config), checkpoints.run_name)
        trajectory = tables.pop(TRAJECTORY, None)
        if trajectory is not None and trajectory.steps(_seed_of(config)) == set(chosen):
            trajectory = None
        todo = _missing(tables, chosen, _seed_of(config))
        rows = len(TRAJECTORY_ROWS) * len(chosen) if trajectory is not None else 0
        count = _Counter(sum(map(len, todo.values())) + rows, progress)
        _measure_each(checkpoints, todo, tables, data, count)
        if trajectory is not None:
            _trajectory(checkpoints, chosen, trajectory, data, count)
    count.finish()
    return {name: table_path(output, name) for name in names}


def load_model(
    checkpoints: Checkpoints, config: TrainingConfig, step: int, device: torch.device | str = "cpu"
) -> InContextRegressionTransformer:
    """The run's model at a checkpoint."""
    model = InContextRegressionTransformer.from_shape(config.task_config.shape, seed=0)
    model.load_state_dict(checkpoints.load(step))
    return model.to(device)


def table_path(output: Path, name: str) -> Path:
    """Where an analysis keeps its table."""
    return output / f"{name}.csv{'.gz' if name in _LONG else ''}"


class _Counter:
    """Counts measurements, each announced before it begins."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._begun, self._total, self._progress = 0, total, progress

    def begin(self, what: str) -> None:
        self._progress(self._begun, what, self._total)
        self._begun += 1

    def finish(self) -> None:
        self._progress(self._total, "", self._total)


def _missing(tables: Mapping[str, AnalysisTable], steps: Sequence[int], seed: int) -> dict[int, list[str]]:
    """Step -> the analyses whose table does not have it."""
    present = {name: table.steps(seed) for name, table in tables.items()}
    missing = {step: [name for name in tables if step not in present[name]] for step in steps}
    return {step: names for step, names in missing.items() if names}


def _measure_each(
    checkpoints: Checkpoints,
    todo: Mapping[int, Sequence[str]],
    tables: Mapping[str, AnalysisTable],
    data: AnalysisData,
    count: _Counter,
) -> None:
    """Fill the tables checkpoint by checkpoint; what is measured is kept, however this ends."""
    written = time.monotonic()
    try:
        for step, names in todo.items():
            model = load_model(checkpoints, data.config, step, data.device)
            for name in names:
                count.begin(f"{name} at step {step}")
                tables[name].add(_seed_of(data.config), step, MEASURES[name](model, data))
            if time.monotonic() - written > _WRITE_EVERY_S:
                for table in tables.values():
                    table.write()
                written = time.monotonic()
    finally:
        for table in tables.values():
            table.write()


def _trajectory(
    checkpoints: Checkpoints, steps: Sequence[int], table: AnalysisTable, data: AnalysisData, count: _Counter
) -> None:
    """Principal components of the run's trajectories, made afresh because they change with every new checkpoint.

    Columns: `model_seed`, `variant` (what a row of the matrix is), `step`, `pc/i`, and `explained_variance_ratio/i`,
    the same for all steps of a variant.
    """
    if len(steps) < 2:
        raise ConfigError("a trajectory needs at least two checkpoints; leave it out with --only")
    parts = []
    for variant, row_of in TRAJECTORY_ROWS.items():

        def rows(variant: str = variant, row_of: RowOf = row_of) -> Iterator[NDArray[np.float32]]:
            for step in steps:
                count.begin(f"{TRAJECTORY} of {variant} at step {step}")
                model = load_model(checkpoints, data.config, step, data.device)
                yield row_of(model, *data.training_sequences).cpu().numpy()

        with tempfile.TemporaryDirectory(dir=table.path.parent, prefix=".trajectory-") as folder:
            dtype = "float16" if variant in ("tokens", "predictions") else "float32"
            matrix = write_rows(Path(folder) / "rows.npy", rows(), len(steps), dtype)
            fitted = pca(matrix, min(NUM_COMPONENTS, len(steps) - 1))
            del matrix
        shares = {f"explained_variance_ratio/{i}": share for i, share in enumerate(fitted.explained_variance_ratio)}
        parts.append(trajectory_table(list(steps), fitted.scores, variant=variant).assign(**shares))
    rows_of_run: pd.DataFrame = pd.concat(parts, ignore_index=True)
    table.replace_run(_seed_of(data.config), rows_of_run)
    table.write()


def _config_of(checkpoints: Checkpoints) -> TrainingConfig:
    stored = checkpoints.config()
    if stored is None:
        raise ConfigError(
            f"the run {checkpoints.run_name} has no config.json beside its checkpoints; is this the name of a run?"
        )
    return TrainingConfig.parse(stored).resolved()


def _chosen_steps(checkpoints: Checkpoints, steps: Sequence[int] | None) -> list[int]:
    present = checkpoints.steps()
    if not present:
        raise ConfigError(f"the run {checkpoints.run_name} has no checkpoints")
    absent = sorted(set(steps or ()) - set(present))
    if absent:
        raise ConfigError(f"the run {checkpoints.run_name} has no checkpoint at step {absent[0]}")
    return present if steps is None else sorted(set(steps))


def _seed_of(config: TrainingConfig) -> int:
    assert config.task_config.model_seed is not None, "seeds are resolved before use"
    return config.task_config.model_seed


def _provenance(data: AnalysisData) -> dict[str, object]:
    """What rows of one table share: the run's settings besides its seeds, the kind of sequences measured on, and the
    library's version."""
    config = data.config.model_dump(mode="json", exclude={"checkpointer_config", "logger_config", "run_name"})
    task = {name: value for name, value in config.pop("task_config").items() if not name.endswith("_seed")}
    return {**config, "task_config": task, "data": data.settings.model_dump(mode="json"), "icl_version": __version__}
