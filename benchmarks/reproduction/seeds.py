"""How far the seeds agree: their chains under the published settings, and their estimates."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table
from benchmarks.reproduction.basin import deviation, median_crossing
from benchmarks.reproduction.shipped import Shipped, estimate
from icl.estimation.tables import ESTIMATES


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders stand for that compare seeds."""
    crossings = [run.crossings(1.0)["crossing"] for run in runs]
    return {
        "crossed_share": [each.notna().mean() for each in crossings],
        "crossing_late": [[median_crossing(run, stage) for stage in ("LR4", "LR5")] for run in runs],
        "norm_late": [[float(run.norms[run.boundaries()[stage]]) for stage in ("LR4", "LR5")] for run in runs],
        "apart": {name: _apart(runs, name) for name in ESTIMATES},
        "seeds_table": _table(runs),
    }


def _apart(runs: Sequence[Shipped], name: str) -> dict[str, float]:
    """How far the estimates of the seeds lie apart at the checkpoints that all of them have."""
    all_seeds = pd.concat([run.needed(name).set_index("step")["llc/mean"] for run in runs], axis=1, join="inner")
    differences = all_seeds.max(axis=1) - all_seeds.min(axis=1)
    return {
        "number": len(all_seeds),
        "median": differences.median(),
        "most": differences.max(),
        "at": differences.idxmax(),
        "range": float(np.ptp(all_seeds.to_numpy())),
    }


def _table(runs: Sequence[Shipped]) -> str:
    rows = []
    for run in runs:
        crossed, table = run.crossings(1.0), run.needed("llc_calibrated")
        at_end, peak = (
            crossed.loc[crossed["step"] == run.boundaries()["LR4"], "crossing"],
            table.loc[table["llc/mean"].idxmax()],
        )
        in_time = (at_end <= run.last_draw() / 2).sum()
        rows.append([
            f"seed {run.seed}", f"{crossed['step'].nunique()}", f"{crossed['crossing'].notna().sum()} of {len(crossed)}",
            f"{in_time} of {len(at_end)}", f"{deviation(run):.1f}", f"{estimate(peak)} at {peak['step']:,}",
        ])  # fmt: skip
    head = [
        "", "checkpoints better than 0", "chains that become worse than 0",
        f"of those at step {runs[0].boundaries()['LR4']:,}, in half the draws",
        "λ̂ is nβ (c − L(w)) to within", "largest calibrated λ̂",
    ]  # fmt: skip
    return markdown_table(head, rows)
