"""What a command prints when its runs have ended: a table of estimates, and remarks on runs that did not learn."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from icl.config.settings import dotted
from icl.config.varying import varying
from icl.estimation import LLCConfig
from icl.execution.names import RunConfig
from icl.execution.surroundings import Surroundings
from icl.tracking import read_summary


def say_how_it_ended(configs: Sequence[RunConfig], place: Surroundings) -> None:
    """Print the estimates of an LLC sweep as a table, and a line for each training run that did not learn."""
    estimates = [config for config in configs if isinstance(config, LLCConfig)]
    if estimates:
        table = estimates_table(estimates, place)
        if table.row_count:
            console = Console()
            # Outside a terminal a program reads the table, so its lines must not be folded at 80 columns.
            (console if console.is_terminal else Console(width=200)).print(table)
            print("`icl tabulate` writes tables with the reasons for each verdict and what to do.", file=sys.stderr)
    for name in dict.fromkeys(config.name for config in configs if not isinstance(config, LLCConfig)):
        if remark := read_summary(place.results / name).get("remark"):
            print(f"icl: {name}: {remark}", file=sys.stderr)


def estimates_table(configs: Sequence[LLCConfig], place: Surroundings) -> Table:
    """One row per run and checkpoint: the run, the settings that vary, the step, λ̂ ± its standard error, and the verdict in short."""
    from icl.estimation.kept import settings_of
    from icl.estimation.traces import read_estimates

    configs = [config.of(place.with_kept_seed(config.training)) for config in configs]
    all_settings = [settings_of(config) for config in configs]
    differing = varying(all_settings)
    table = Table(title="estimates", title_justify="left")
    table.add_column("run", overflow="fold")
    for setting in differing:
        table.add_column(short_name(setting, differing), justify="right")
    table.add_column("step", justify="right")
    table.add_column("λ̂ ± s.e.", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", ratio=1)
    for config, settings in zip(configs, all_settings, strict=True):
        flat = dotted(settings)
        for row in read_estimates(place.results / config.name):
            table.add_row(
                config.subject_name, *(str(flat.get(setting)) for setting in differing), f"{row['step']:,}",
                estimate_text(row), in_short(str(row.get("verdict", ""))),
            )  # fmt: skip
    return table


def estimate_text(row: Mapping[str, Any]) -> str:
    """λ̂ ± its standard error as text, with as many digits as the error justifies."""
    value, error = row.get("llc/mean"), row.get("llc/mcse")
    if not isinstance(value, (int, float)):
        return "?"
    if not isinstance(error, (int, float)) or error != error or error <= 0:
        return f"{value:.3g} ± ?"
    return f"{value:.1f} ± {error:.1f}" if error >= 0.1 else f"{value:.3f} ± {error:.2g}"


def in_short(verdict: str) -> str:
    """The findings of a verdict without reasons and remedies, such as `negative; chains disagree`."""
    plain = re.sub(r"\s*\([^()]*\)", "", verdict)
    findings = [finding.strip() for finding in plain.split(";")]
    return "; ".join(each if each.startswith("not tested") else each.partition(":")[0] for each in findings)


def short_name(setting: str, among: Sequence[str]) -> str:
    """The last part of a dotted name, or the whole name if another one in `among` has the same last part."""
    last = setting.rpartition(".")[2]
    return setting if sum(other.rpartition(".")[2] == last for other in among) > 1 else last
