"""Run analyses over the checkpoints of a run, with one table per analysis. An interrupted call can be continued."""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from icl import __version__
from icl.analysis.data import AnalysisData, DataSettings
from icl.analysis.essential_dynamics import NUM_EQUAL_STEPS, pca, trajectory_table, write_rows
from icl.analysis.measures import MANY_ROWS, MEASURES, OF_FAMILIES
from icl.analysis.tables import RUN, AnalysisTable
from icl.analysis.trajectories import gradient_row, output_row, weight_row
from icl.checkpoints import Checkpoints
from icl.config import ConfigError, TrainingConfig, expand_steps
from icl.model import InContextRegressionTransformer
from icl.storage.locks import exclusive

Progress = Callable[[int, str, int], None]
"""Called with (measurements done, what comes next, measurements in all). A measurement is one analysis of one checkpoint."""

TRAJECTORY, ESSENTIAL_DYNAMICS = "trajectory", "essential_dynamics"
ANALYSES = (*MEASURES, TRAJECTORY)
"""The default analyses: those of single checkpoints (`measures.MEASURES`), and `trajectory`."""
ON_REQUEST = (ESSENTIAL_DYNAMICS, *(name for name in OF_FAMILIES if name not in MEASURES))
"""Further analyses that `only` may name. They need a run with many checkpoints, or are meant for families of runs."""

Key = Literal["model_seed", "num_tasks"]
"""The setting that tells the runs of a folder apart."""

RowOf = Callable[[InContextRegressionTransformer, torch.Tensor, torch.Tensor], torch.Tensor]
TRAJECTORY_ROWS: Mapping[str, RowOf] = {
    "tokens": output_row,
    "predictions": partial(output_row, part="predictions"),
    "weights": lambda model, xs, ys: weight_row(dict(model.named_parameters())),
    "gradient": gradient_row,
}
_VARIANTS = {TRAJECTORY: tuple(TRAJECTORY_ROWS), ESSENTIAL_DYNAMICS: ("tokens", "predictions")}
NUM_COMPONENTS = 4
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
    key: Key = "model_seed",
) -> dict[str, Path]:
    """Measure a run's checkpoints and keep the tables in a folder.

    Checkpoints that are in a table already are not measured again, so a second call continues where the first one stopped.
    Several seeds of one configuration may share the folder; their rows differ in `model_seed`. A JSON file beside each table
    holds the settings with which it was made.

    Args:
        checkpoints: those of one run, with the configuration that training stored beside them.
        output: the folder for the tables: `<analysis>.csv`, or `.csv.gz` for those with many rows per checkpoint.
        only: analyses to run, out of `ANALYSES` and `ON_REQUEST`.
        steps: checkpoints to use; None: all. `essential_dynamics` uses those nearest to `NUM_EQUAL_STEPS` equally spaced steps.
        settings: which sequences to measure on.
        device: the device for models and sequences.
        progress: called before every measurement and at the end. Measurements that are in a table already do not count.
        key: the column that tells the folder's runs apart. The runs share all other settings; with "model_seed" they may differ
            in all seeds.

    Returns:
        Analysis -> file of its table.

    Raises:
        ConfigError: an analysis is unknown, the run has no configuration or no checkpoints, a step has no checkpoint, or there are
            too few checkpoints for a trajectory.
        ValueError: a table in the folder was made with other settings.
        RunInUseError: another process writes to the folder.
    """
    names = list(dict.fromkeys(only))
    known = (*ANALYSES, *ON_REQUEST)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"there is no analysis {unknown[0]!r}; known: {', '.join(known)}")
    config = config_of(checkpoints)
    chosen = _chosen_steps(checkpoints, steps)
    data = AnalysisData(config, settings or DataSettings(), device)
    run = key_of(config, key)
    trajectory_steps = {TRAJECTORY: chosen}
    if ESSENTIAL_DYNAMICS in names:
        trajectory_steps[ESSENTIAL_DYNAMICS] = equal_steps(chosen, config.num_steps)
    with exclusive(output / ".lock", f"the folder {output}"):
        tables = {name: AnalysisTable(table_path(output, name), provenance(data, key), key) for name in names}
        for table in tables.values():
            table.begin_run(run, checkpoints.run_name)
        trajectories = {name: tables.pop(name) for name in trajectory_steps if name in tables}
        trajectories = {
            name: table for name, table in trajectories.items() if table.steps(run) != set(trajectory_steps[name])
        }
        todo = _missing(tables, chosen, run)
        rows = sum(len(_VARIANTS[name]) * len(trajectory_steps[name]) for name in trajectories)
        count = Counter(sum(map(len, todo.values())) + rows, progress)
        _measure_each(checkpoints, todo, tables, data, count)
        for name, table in trajectories.items():
            _trajectory(checkpoints, trajectory_steps[name], _VARIANTS[name], table, data, count)
    count.finish()
    return {name: table_path(output, name) for name in names}


def equal_steps(present: Sequence[int], num_steps: int, num: int = NUM_EQUAL_STEPS) -> list[int]:
    """The checkpoints nearest to `num` equally spaced steps of a run, or to every step of a run with fewer steps.

    Args:
        present: steps that have a checkpoint, in any order; at least one.
        num_steps: the length of the run.
        num: number of grid points from 0 to `num_steps`. The last one is not a step of the run and is dropped.

    Raises:
        ConfigError: a grid point has no checkpoint within half the distance to the next grid point.
    """
    targets = np.array(expand_steps({"linear_space": num}, num_steps))
    steps = np.array(sorted(present))
    above = np.searchsorted(steps, targets).clip(max=len(steps) - 1)
    below = (above - 1).clip(min=0)
    nearest = np.where(steps[above] - targets < targets - steps[below], steps[above], steps[below])
    far = np.flatnonzero(np.abs(nearest - targets) >= max(1.0, num_steps / num / 2))
    if far.size:
        raise ConfigError(
            f"{ESSENTIAL_DYNAMICS} needs {len(targets):,} equally spaced checkpoints, and there is none near step "
            f"{targets[far[0]]:,}; let the run finish, or train it with "
            f"checkpointer_config.checkpoint_steps.linear_space={num}"
        )
    return nearest.tolist()


def load_model(
    checkpoints: Checkpoints, config: TrainingConfig, step: int, device: torch.device | str = "cpu"
) -> InContextRegressionTransformer:
    """The run's model at a checkpoint."""
    return InContextRegressionTransformer.from_weights(config.task_config.shape, checkpoints.load(step)).to(device)


def table_path(output: Path, name: str) -> Path:
    """The file of an analysis' table."""
    return output / f"{name}.csv{'.gz' if name in (*MANY_ROWS, ESSENTIAL_DYNAMICS) else ''}"


class Counter:
    """Counts measurements and reports each before it begins."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._begun, self._total, self._progress = 0, total, progress

    def begin(self, what: str) -> None:
        self._progress(self._begun, what, self._total)
        self._begun += 1

    def finish(self) -> None:
        self._progress(self._total, "", self._total)


def _missing(tables: Mapping[str, AnalysisTable], steps: Sequence[int], run: float) -> dict[int, list[str]]:
    """Step -> the analyses whose tables lack it."""
    present = {name: table.steps(run) for name, table in tables.items()}
    missing = {step: [name for name in tables if step not in present[name]] for step in steps}
    return {step: names for step, names in missing.items() if names}


def _measure_each(
    checkpoints: Checkpoints,
    todo: Mapping[int, Sequence[str]],
    tables: Mapping[str, AnalysisTable],
    data: AnalysisData,
    count: Counter,
) -> None:
    """Fill the tables checkpoint by checkpoint. All that was measured is kept, also after an error."""
    written = time.monotonic()
    measures = {**OF_FAMILIES, **MEASURES}
    try:
        for step, names in todo.items():
            model = load_model(checkpoints, data.config, step, data.device)
            for name in names:
                count.begin(f"{name} at step {step}")
                tables[name].add(key_of(data.config, tables[name].key), step, measures[name](model, data))
            if time.monotonic() - written > _WRITE_EVERY_S:
                for table in tables.values():
                    table.write()
                written = time.monotonic()
    finally:
        for table in tables.values():
            table.write()


def _trajectory(
    checkpoints: Checkpoints,
    steps: Sequence[int],
    variants: Sequence[str],
    table: AnalysisTable,
    data: AnalysisData,
    count: Counter,
) -> None:
    """Principal components of the run's trajectories. All are computed again, because they change with every new checkpoint.

    Columns: the run's key, `variant` (by what a checkpoint is described, see TRAJECTORY_ROWS), `step`, `pc/i`, and
    `explained_variance_ratio/i`, which is the same for all steps of a variant.
    """
    if len(steps) < 2:
        raise ConfigError("a trajectory needs at least two checkpoints; choose other analyses with --only")
    parts = []
    for variant in variants:

        def rows(variant: str = variant, row_of: RowOf = TRAJECTORY_ROWS[variant]) -> Iterator[NDArray[np.float32]]:
            for step in steps:
                count.begin(f"trajectory of {variant} at step {step}")
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
    table.replace_run(key_of(data.config, table.key), rows_of_run)
    table.write()


def config_of(checkpoints: Checkpoints) -> TrainingConfig:
    """The settings that training stored beside the checkpoints, with resolved seeds.

    Raises:
        ConfigError: no settings are stored.
    """
    stored = checkpoints.config()
    if stored is None:
        raise ConfigError(
            f"the run {checkpoints.run_name} has no config.json beside its checkpoints; check its name (`icl runs` lists all runs)"
        )
    config = TrainingConfig.parse(stored).resolved()
    checkpoints.expect(config)  # so that checkpoints of another run in the folder are refused
    return config


def _chosen_steps(checkpoints: Checkpoints, steps: Sequence[int] | None) -> list[int]:
    present = checkpoints.steps()
    if not present:
        raise ConfigError(f"the run {checkpoints.run_name} has no checkpoints; train it first")
    absent = sorted(set(steps or ()) - set(present))
    if absent:
        raise ConfigError(f"the run {checkpoints.run_name} has no checkpoint at step {absent[0]}")
    return present if steps is None else sorted(set(steps))


def key_of(config: TrainingConfig, key: str = RUN) -> float:
    """A run's value of the setting that tells runs apart; infinity for Gaussian tasks."""
    value = getattr(config.task_config, key)
    return math.inf if value is None else value


def provenance(data: AnalysisData, key: str = RUN) -> dict[str, object]:
    """The settings that all rows of a table must share: those of the run, those of the sequences, and the library's version.

    The key is left out. If seeds tell the runs apart, all seeds are left out.
    """
    shared = set(TrainingConfig.model_fields) - {"checkpointer_config", "logger_config", "run_name"}
    config = data.config.decisive(*shared)
    varies = "_seed" if key == RUN else key
    task = {name: value for name, value in config.pop("task_config").items() if not name.endswith(varies)}
    return {**config, "task_config": task, "data": data.settings.model_dump(mode="json"), "icl_version": __version__}
