"""`icl figures`: draws every figure for which a folder has the tables."""

import re
import sys
from collections import Counter
from pathlib import Path

import torch

from icl.devices import available_cores
from icl.figures.build import StageChoice, build_figures

_LEFT_OUT = re.compile(r"left out (\S+): (?:no (\S+) table)?")


def figures_command(data: Path, output: Path, jobs: int | None, stages: StageChoice, verbose: bool) -> list[Path]:
    """Draw the figures and return their files. At most two lines say which were left out.

    Raises:
        ValueError: the folder has no table.
    """
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if verbose or not line.startswith(("left out", "drew")):
            print(f"icl: {line}", file=sys.stderr)

    paths = build_figures(data, output, report, jobs or available_cores(torch.device("cpu")), stages)
    if not verbose:
        for line in left_out(lines):
            print(line, file=sys.stderr)
    return paths


def left_out(lines: list[str]) -> list[str]:
    """The lines of `build_figures` about figures that were not drawn, summed up in at most two lines."""
    found = [match for line in lines if (match := _LEFT_OUT.match(line))]
    missing = Counter(match[2] for match in found if match[2])
    others = sorted({match[1].rpartition("/")[2] for match in found if not match[2]})
    summary = []
    if missing:
        tables = ", ".join(sorted(missing))
        summary.append(
            f"icl: left out {sum(missing.values())} figures, whose tables are missing ({tables}): `icl analyse RUN` and `icl tabulate "
            "SWEEP` make them; --verbose names the figures"
        )
    if others:
        summary.append(f"icl: left out, because the tables lack data: {', '.join(others)}; --verbose says which data")
    return summary
