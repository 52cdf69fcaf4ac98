"""`icl analyse`: the tables of one run, or of the runs of a training sweep together."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.analysis.family import FAMILY_ANALYSES, analyse_family
from icl.analysis.run import ANALYSES, analyse
from icl.checkpoints import Checkpoints
from icl.checkpoints.run import FOLDER
from icl.commands.analyse_language import analyse_folder, analyse_run
from icl.config import ConfigError, TrainingConfig
from icl.config.kinds import parse_training
from icl.config.language import LanguageTraining
from icl.config.sweeps import expand, load_sweep
from icl.devices import resolve_device
from icl.execution.progress import progress_bar
from icl.storage import LocalStore, store_from_environment


def analyse_command(
    run: str,
    only: Sequence[str] | None,
    output: Path | None,
    environ: Mapping[str, str] = os.environ,
    tokens: Path | None = None,
) -> dict[str, Path]:
    """Run the analyses of a run, named or given as a folder `<root>/icl/<run>`; returns analysis -> table.

    With `tokens`, the folder is one of a language model's public checkpoint files.

    Raises:
        ConfigError: an unknown analysis, no such run, or a folder that is not one of a run.
    """
    folder = Path(run).resolve()
    if tokens is not None:
        return analyse_folder(folder, tokens, output)
    if folder.is_dir():
        if folder.parent.name != FOLDER:
            raise ConfigError(
                f"{run} is not the folder of a run; give the one that holds config.json, ROOT/{FOLDER}/RUN (for the public files of a "
                "language model, say --tokens too)"
            )
        checkpoints = Checkpoints(LocalStore(folder.parent.parent), folder.name)
    else:
        checkpoints = Checkpoints(store_from_environment(environ), run)
    stored = checkpoints.settings()
    if stored is not None and isinstance(config := parse_training(stored), LanguageTraining):
        return analyse_run(checkpoints, config.resolved(), output)
    target = output or Path("data") / checkpoints.run_name
    with progress_bar("analysing") as update:
        paths = analyse(
            checkpoints, target, only or ANALYSES, device=resolve_device(environ.get("DEVICE")), progress=update
        )
    for path in paths.values():
        print(path)
    return paths


def analyse_family_command(
    sweep: Path,
    overrides: Sequence[str],
    only: Sequence[str] | None,
    output: Path | None,
    environ: Mapping[str, str] = os.environ,
) -> list[Path]:
    """Run the analyses of the runs of a training sweep together; returns the tables.

    Runs without checkpoints are left out, with a line that says so.

    Raises:
        ConfigError: a wrong file or analysis, no run with checkpoints, or runs that differ in more than num_tasks.
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
