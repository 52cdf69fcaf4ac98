"""`icl tabulate`: writes tables of the results of a sweep's runs."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl.analysis.run_tables import RunTable, read_run_table
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
    table = read_run_table(paths[0]) if any(path.name == f"{name}.csv" for path in paths) else None
    if table is None:
        print(f"icl: no run has estimates yet; make them with: icl llc {sweep} --preset calibrated", file=sys.stderr)
    elif len(gammas := chosen_localisations(table)) > 1:
        print(
            f"icl: pilot chains chose γ for each run, from {gammas[0]:g} to {gammas[-1]:g}, so λ̂ can be compared within a run only; for "
            "other comparisons choose one with --set sampler_config.gamma=NUMBER, in `icl llc` and here",
            file=sys.stderr,
        )
    return paths


def chosen_localisations(estimates: RunTable) -> list[float]:
    """The localisations γ in a table whose settings leave the choice to pilot chains, in order. Empty if the settings give γ."""
    settings = estimates.settings.get("sampler_config", {})
    left_open = all(settings.get(name, 0) is None for name in ("gamma", "localization_scale"))
    return sorted(set(estimates.rows["gamma"].dropna())) if left_open and "gamma" in estimates.rows else []
