"""`icl analyse`: makes the tables of one run, or of all runs of a training sweep together."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.analysis.family import FAMILY_ANALYSES, analyse_family
from icl.analysis.run import ANALYSES, analyse
from icl.checkpoints import Checkpoints
from icl.checkpoints.run import FOLDER
from icl.commands.analyse_language import analyse_folder, analyse_run
from icl.commands.analyse_subject import analyse_sweep
from icl.config import ConfigError, TrainingConfig
from icl.config.kinds import parse_training
from icl.config.language import LanguageTraining
from icl.config.steps import nearest_step, refuse_missing_steps, spread_in_log_time
from icl.config.sweeps import YAML, expand, load_sweep
from icl.devices import resolve_device
from icl.execution.points import choice_overrides, parse_steps
from icl.execution.progress import progress_bar
from icl.storage import LocalStore, store_from_environment


def analyse_command(
    run: str,
    only: Sequence[str] | None,
    output: Path | None,
    environ: Mapping[str, str] = os.environ,
    tokens: Path | None = None,
    count: int | None = None,
    steps: str | None = None,
    nearest: bool = False,
    overrides: Sequence[str] = (),
    samples: int | None = None,
) -> dict[str, Path]:
    """Run the analyses of one run, or of the subjects of a sweep; returns analysis -> file of its table.

    Args:
        run: name of the run, or its folder `<root>/icl/<run>`, or a sweep file that names a subject (`icl.commands.analyse_subject`).
        only: the analyses to run; None: all.
        output: folder of the tables; None: `data/<run>`.
        tokens: file of token rows. If given, `run` is a folder with a language model's public checkpoint files.
        count: number of checkpoints, spread evenly in log t; None: all, or `steps`.
        steps: the checkpoints, as a text such as `0,100,499`.
        nearest: whether the nearest checkpoint is taken for a step that has none.
        overrides: of the settings of a sweep file.
        samples: for a sweep file, the samples of the data on which the loss and the Hessian are measured.

    Raises:
        ConfigError: the analysis is unknown, there is no such run, the folder is not that of a run, a step has no checkpoint, or the sweep
            file is wrong.
    """
    if Path(run).suffix in YAML:
        if tokens is not None:
            raise ConfigError(
                "--tokens is for a folder of public files; the sweep file names the tokens of its subject"
            )
        chosen = choice_overrides(None, count, steps, nearest)
        return analyse_sweep(Path(run), [*chosen, *overrides], only, output, environ, samples)
    if overrides or samples is not None:
        raise ConfigError(
            "--set and --samples are for a sweep file: give one in place of the run, or --family for --set"
        )
    folder = Path(run).resolve()
    if tokens is not None:
        if count is not None or steps is not None or nearest:
            raise ConfigError("--checkpoints, --steps and --nearest are for a run, not for a folder of public files")
        return analyse_folder(folder, tokens, output)
    if folder.is_dir():
        if folder.parent.name != FOLDER:
            raise ConfigError(
                f"{run} is not the folder of a run; give the one that holds config.json, ROOT/{FOLDER}/RUN (for the public files of a "
                "language model, add --tokens)"
            )
        checkpoints = Checkpoints(LocalStore(folder.parent.parent), folder.name)
    else:
        checkpoints = Checkpoints(store_from_environment(environ), run)
    stored = checkpoints.settings()
    if stored is not None and isinstance(config := parse_training(stored), LanguageTraining):
        return analyse_run(checkpoints, config.resolved(), output, _chosen(checkpoints, count, steps, nearest))
    target = output or Path("data") / checkpoints.run_name
    with progress_bar("analysing") as update:
        paths = analyse(
            checkpoints, target, only or ANALYSES, steps=_chosen(checkpoints, count, steps, nearest),
            device=resolve_device(environ.get("DEVICE")), progress=update,
        )  # fmt: skip
    for path in paths.values():
        print(path)
    return paths


def _chosen(checkpoints: Checkpoints, count: int | None, steps: str | None, nearest: bool) -> list[int] | None:
    """The steps that the options choose, or None for all."""
    if count is not None and steps is not None:
        raise ConfigError("--checkpoints and --steps both choose the checkpoints; give one of them")
    present = checkpoints.steps()
    if not present or (count is None and steps is None):
        return None
    if steps is None:
        assert count is not None
        return spread_in_log_time(present, count) if count > 1 else [present[-1]]
    wanted = parse_steps(steps)
    if nearest:
        return sorted({nearest_step(present, step) for step in wanted})
    refuse_missing_steps(wanted, present, checkpoints.run_name)
    return wanted


def analyse_family_command(
    sweep: Path,
    overrides: Sequence[str],
    only: Sequence[str] | None,
    output: Path | None,
    environ: Mapping[str, str] = os.environ,
) -> list[Path]:
    """Run the analyses that compare the runs of a training sweep; returns the files of the tables.

    Runs without checkpoints are left out, and a line says so.

    Raises:
        ConfigError: the file or an analysis is wrong, no run has checkpoints, or runs differ in more than num_tasks.
    """
    store = store_from_environment(environ)
    configs = [TrainingConfig.parse(data) for data in expand(load_sweep(sweep), overrides)]
    runs = []
    for name in dict.fromkeys(config.name for config in configs):
        run = Checkpoints(store, name)
        if run.steps():
            runs.append(run)
        else:
            print(f"icl: left out {name}: it has no checkpoints", file=sys.stderr)
    if not runs:
        raise ConfigError(f"no run of {sweep} has checkpoints; make them with: icl train {sweep}")
    target = output or Path("data") / sweep.stem
    with progress_bar("analysing") as update:
        paths = analyse_family(
            runs, target, only or FAMILY_ANALYSES, device=resolve_device(environ.get("DEVICE")), progress=update
        )
    for path in paths:
        print(path)
    return paths
