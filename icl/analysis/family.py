"""Run analyses over a family of runs, which differ only in the number of training tasks M."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from icl.analysis.data import AnalysisData, DataSettings, FamilyRun
from icl.analysis.measures import JOINT, OF_FAMILIES
from icl.analysis.run import Counter, Key, Progress, analyse, config_of, key_of, load_model, provenance, table_path
from icl.analysis.tables import AnalysisTable, write_table
from icl.checkpoints import Checkpoints
from icl.config import ConfigError, TrainingConfig
from icl.model import InContextRegressionTransformer
from icl.storage.locks import exclusive

FAMILY_ANALYSES = (*OF_FAMILIES, *JOINT)
KEY: Key = "num_tasks"


def analyse_family(
    runs: Sequence[Checkpoints],
    output: Path,
    only: Iterable[str] = FAMILY_ANALYSES,
    *,
    settings: DataSettings | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, note, total: None,
) -> list[Path]:
    """Measure the checkpoints of several runs, and keep tables with the rows of all of them. `num_tasks` tells the runs apart.

    Checkpoints that are in a table already are not measured again. Analyses of all runs together are made again if there is a new
    checkpoint.

    Args:
        runs: the runs, each with checkpoints and with the configuration that training stored beside them.
        output: the folder for the tables.
        only: analyses to run, out of `FAMILY_ANALYSES`.
        settings: which sequences to measure on.
        device: the device for models and sequences.
        progress: called before every measurement and at the end.

    Returns:
        The files of the tables.

    Raises:
        ConfigError: an analysis is unknown, or the runs are not a family.
        ValueError: a table in the folder was made with other settings.
        RunInUseError: another process writes to the folder.
    """
    names = list(dict.fromkeys(only))
    unknown = [name for name in names if name not in FAMILY_ANALYSES]
    if unknown:
        raise ConfigError(f"there is no analysis {unknown[0]!r} of families; known: {', '.join(FAMILY_ANALYSES)}")
    configs = [config_of(run) for run in runs]
    family = dict(sorted(zip((key_of(config, KEY) for config in configs), runs, strict=True), key=lambda item: item[0]))
    _check_family(configs, len(family))
    measured = [name for name in names if name in OF_FAMILIES]
    written: dict[str, Path] = {}
    for tasks, run in family.items():
        said = partial(_said, progress, f"M={tasks}")
        written |= analyse(run, output, measured, settings=settings, device=device, progress=said, key=KEY)
    paths = list(written.values())
    for name in (name for name in names if name in JOINT):
        paths += _joint(name, family, output, settings or DataSettings(), device, progress)
    return paths


def _joint(
    name: str,
    family: Mapping[float, Checkpoints],
    output: Path,
    settings: DataSettings,
    device: torch.device | str,
    progress: Progress,
) -> list[Path]:
    """The tables of one analysis of all runs together."""
    data = {tasks: AnalysisData(config_of(run), settings, device) for tasks, run in family.items()}
    steps = {tasks: run.steps() for tasks, run in family.items()}
    with exclusive(output / ".lock", f"the folder {output}"):
        table = AnalysisTable(table_path(output, name), provenance(next(iter(data.values())), KEY), KEY)
        for tasks, run in family.items():
            table.begin_run(tasks, run.run_name)
        if set(table.rows[KEY]) == set(family) and all(table.steps(tasks) == set(steps[tasks]) for tasks in family):
            return [table.path]
        count = Counter(sum(map(len, steps.values())), progress)

        def model(tasks: float, step: int) -> InContextRegressionTransformer:
            count.begin(f"{name} of M={tasks} at step {step}")
            return load_model(family[tasks], data[tasks].config, step, device)

        made = JOINT[name].measure(
            {tasks: FamilyRun(data[tasks], steps[tasks], partial(model, tasks)) for tasks in family}
        )
        paths = [table.path]
        for other, rows in made.items():
            if other != name:
                write_table(rows, table_path(output, other))
                paths.append(table_path(output, other))
        table.rows = table.rows.iloc[:0]  # also drops runs that are no longer in the family
        for tasks in family:
            table.replace_run(tasks, made[name].loc[made[name][KEY] == tasks].drop(columns=KEY))
        table.write()  # written last, because it marks the other tables as complete
    count.finish()
    return paths


def _said(progress: Progress, run: str, done: int, note: str, total: int) -> None:
    """Report the progress of one run of several."""
    progress(done, f"{run}, {note}" if note else run, total)


def _check_family(configs: Sequence[TrainingConfig], num_different: int) -> None:
    """Check that the runs differ in the number of tasks, and in nothing else.

    Raises:
        ConfigError: they differ in another setting, or two have the same number of tasks.
    """
    if not configs:
        raise ConfigError("a family needs at least one run with checkpoints")
    shared = [provenance(AnalysisData(config), KEY) for config in configs]
    for other in shared[1:]:
        for name, value in shared[0].items():
            if other[name] != value:
                raise ConfigError(
                    f"the runs of a family must differ only in num_tasks, but these differ in {name}: {value} and {other[name]}; "
                    "choose some of them with --set"
                )
    if num_different < len(configs):
        raise ConfigError("two runs of the family have the same num_tasks; choose one of them with --set")
