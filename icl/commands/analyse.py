"""`icl analyse`: the tables of one run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.analysis.run import ANALYSES, analyse
from icl.checkpoints import Checkpoints
from icl.checkpoints.run import FOLDER
from icl.config import ConfigError
from icl.devices import resolve_device
from icl.execution.progress import progress_bar
from icl.storage import LocalStore, store_from_environment


def analyse_command(
    run: str, only: Sequence[str] | None, output: Path | None, environ: Mapping[str, str] = os.environ
) -> dict[str, Path]:
    """Run the analyses of a run, named or given as a folder `<root>/icl/<run>`; returns analysis -> table.

    Raises:
        ConfigError: an unknown analysis, no such run, or a folder that is not one of a run.
    """
    folder = Path(run).resolve()
    if folder.is_dir():
        if folder.parent.name != FOLDER:
            raise ConfigError(
                f"{run} is not the folder of a run; give the one that holds config.json, ROOT/{FOLDER}/RUN"
            )
        checkpoints = Checkpoints(LocalStore(folder.parent.parent), folder.name)
    else:
        checkpoints = Checkpoints(store_from_environment(environ), run)
    target = output or Path("data") / checkpoints.run_name
    with progress_bar("analysing") as update:
        paths = analyse(
            checkpoints,
            target,
            only or ANALYSES,
            device=resolve_device(environ.get("DEVICE")),
            progress=lambda done, note, total: update(done, note, total),
        )
    for path in paths.values():
        print(path)
    return paths
