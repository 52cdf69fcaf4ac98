"""The traces that `icl llc` stores for each checkpoint, beside a row of metrics: the chains' losses along their draws, thinned.

A trace is one JSON line in `traces.jsonl` of the results folder. A run that was killed between writing the trace and the
metrics may write a trace twice; the last one counts.

Shapes: E chains, N draws, P points.
"""

from pathlib import Path
from typing import Any

import torch

from icl.sampling import LLCResult
from icl.storage import StorageError
from icl.storage.files import explain
from icl.storage.jsonl import JsonLines, Row, has_step, read_json_lines
from icl.tracking import read_metrics

TRACES = "traces.jsonl"
POINTS = 100
"""The number of points that are kept of each chain."""


def thinned(result: LLCResult, points: int = POINTS) -> dict[str, Any]:
    """The chains cut into at most `points` stretches of nearly equal length.

    Returns:
        `draw` (P,): draws done at the end of each stretch. `loss` (E, P): mean loss over the stretch, because the loss of a
        single draw is mostly noise of its batch. `distance` (E, P): ‖w - w*‖ at the end of the stretch.
    """
    draws = result.loss_trace.shape[1]
    stretches = torch.arange(draws).tensor_split(min(points, draws))
    ends = torch.stack([stretch[-1] for stretch in stretches])
    loss = torch.stack([result.loss_trace[:, stretch].mean(dim=1) for stretch in stretches], dim=1)
    distance = result.distances[:, ends]
    return {"draw": (ends + 1).tolist(), "loss": _short(loss), "distance": _short(distance)}


def append_trace(folder: Path, step: int, result: LLCResult) -> None:
    """Add one checkpoint's trace to the results folder."""
    JsonLines(folder / TRACES, sound=_is_trace).append({"step": step, **thinned(result)})


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """The traces of a results folder, one per checkpoint in order."""
    path = folder / TRACES
    try:
        found = {trace["step"]: trace for trace in read_json_lines(path, _is_trace)}
    except OSError as error:
        raise StorageError(f"cannot read {path}: {explain(error)}") from error
    return [found[step] for step in sorted(found)]


def read_estimates(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a results folder, one row per checkpoint in order.

    If the folder has traces, checkpoints without a trace are left out.
    """
    rows = {row["step"]: row for row in read_metrics(folder)}
    traced = {trace["step"] for trace in read_traces(folder)} or set(rows)
    return [rows[step] for step in sorted(rows) if step in traced]


def _is_trace(row: Row) -> bool:
    """Whether a row is a trace: P draws, and P losses and distances of each of E chains."""
    draws, chains = row.get("draw"), [row.get("loss"), row.get("distance")]
    if not has_step(row) or not isinstance(draws, list) or not all(isinstance(values, list) for values in chains):
        return False
    lengths = [[len(chain) if isinstance(chain, list) else None for chain in values or []] for values in chains]
    return lengths[0] == lengths[1] == [len(draws)] * len(lengths[0])


def _short(values: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in chain] for chain in values.tolist()]
