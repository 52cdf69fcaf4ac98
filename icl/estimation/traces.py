"""The course of the chains of an estimate, thinned, kept beside its metrics.

One JSON line per checkpoint in `traces.jsonl` of the results folder. A line that was written twice, because a run was
killed between its trace and its metrics, counts once: the last.

Shapes: E chains, N draws, P points.
"""

from pathlib import Path
from typing import Any

import torch

from icl.sampling import LLCResult
from icl.storage.jsonl import JsonLines, read_json_lines

TRACES = "traces.jsonl"
POINTS = 100
"""Points kept of each chain."""


def thinned(result: LLCResult, points: int = POINTS) -> dict[str, Any]:
    """The chains cut into at most `points` stretches of nearly equal length.

    Returns:
        `draw` (P,): draws done at the end of each stretch; `loss` (E, P): mean loss over the stretch, since a single
        draw's loss is mostly the noise of its batch; `distance` (E, P): ‖w - w*‖ at the end of the stretch.
    """
    draws = result.loss_trace.shape[1]
    stretches = torch.arange(draws).tensor_split(min(points, draws))
    ends = torch.stack([stretch[-1] for stretch in stretches])
    loss = torch.stack([result.loss_trace[:, stretch].mean(dim=1) for stretch in stretches], dim=1)
    distance = result.distances[:, ends]
    return {"draw": (ends + 1).tolist(), "loss": _short(loss), "distance": _short(distance)}


def append_trace(folder: Path, step: int, result: LLCResult) -> None:
    """Add one checkpoint's trace to the results folder."""
    JsonLines(folder / TRACES).append({"step": step, **thinned(result)})


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """The traces of a results folder, one per checkpoint in order."""
    found = {trace["step"]: trace for trace in read_json_lines(folder / TRACES)}
    return [found[step] for step in sorted(found)]


def _short(values: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in chain] for chain in values.tolist()]
