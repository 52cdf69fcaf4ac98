"""`icl tabulate`: writes tables of the results of a sweep's runs."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.config.sweeps import load_sweep
from icl.estimation.tables import tabulate
from icl.execution.points import llc_points
from icl.sampling.presets import preset_named
from icl.storage import local_root


def tabulate_command(
    sweep: Path,
    output: Path | None,
    name: str,
    preset: str | None,
    overrides: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> list[Path]:
    """Write the tables of a training sweep or an LLC sweep; returns their files.

    Raises:
        ConfigError: see `icl.estimation.tables.tabulate`; or the file, an override or the preset is wrong.
    """
    if preset is not None:
        preset_named(preset)
    configs = llc_points(load_sweep(sweep), overrides, environ)
    paths = tabulate(configs, local_root(environ) / "icl", output or Path("data") / sweep.stem, name, preset)
    if not any(path.name == f"{name}.csv" for path in paths):
        print(f"icl: no run has estimates yet; make them with: icl llc {sweep} --preset calibrated", file=sys.stderr)
    return paths
