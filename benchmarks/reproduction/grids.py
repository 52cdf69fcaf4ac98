"""The section on the calibration grids, from data/calibration."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table
from benchmarks.reproduction.comparison import Comparison
from benchmarks.reproduction.shipped import Shipped, estimate
from icl.analysis.run_tables import keys_of
from icl.figures.calibration_grids import BATCHES, LOCALISATION, LOSSES
from icl.figures.elements import HEALTHY, UNTESTED, numbers, rows_where
from icl.figures.families import read_table
from icl.sampling.verdict import RHAT_LIMIT

LOSS = "sampler_config.eval_loss_fn"
VARIES = {
    "eps_temp_gamma": "step size, temperature, localisation",
    "eval_dataset_size": "n, the size of the data set",
    "eval_fixed_batch": "size of a fixed batch for the loss",
    "eval_minibatch": "size of the batch; the loss on it or on a new one",
    "eval_loss_fn": "the loss that drives the chains",
    "fresh_seeds": "a sampling seed for each checkpoint",
    "fixed_seed": "one sampling seed for all",
    "non_minima": "model seed, at step 0",
    "non_exploration": "model seed, almost no noise",
}


@dataclass(frozen=True)
class Grid:
    """One grid: its estimates, and the settings that they share.

    Attributes:
        folder: data/calibration.
        name: of its table.
    """

    folder: Path
    name: str

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per setting and checkpoint."""
        return read_table(self.folder, self.name)

    @cached_property
    def sampler(self) -> dict[str, Any]:
        """The settings of the sampler that all estimates share."""
        return json.loads((self.folder / f"{self.name}.json").read_text())["sampler_config"]

    @property
    def llc(self) -> Comparison:
        """λ̂ of every row."""
        return Comparison(None, self.table["llc/mean"].tolist())

    @property
    def lost(self) -> int:
        """Estimates of which every chain diverged."""
        return sum(self.table["llc/mean"].isna())

    @property
    def failed(self) -> int:
        """Estimates that failed a test of their chains, or whose chains diverged."""
        verdicts = self.table["verdict"]
        return sum((verdicts != HEALTHY) & ~verdicts.str.startswith(UNTESTED))

    def by_setting(self, head: str, title: Callable[..., str]) -> str:
        """λ̂ with its error: a row for each setting, a column for each checkpoint. `title` names a setting by its values."""
        steps = sorted(set(self.table["step"]))
        keys = [key for key in keys_of(self.table) if key != "model_seed"]
        rows = []
        for values in self.table[keys].drop_duplicates().itertuples(index=False, name=None):
            cells = rows_where(self.table, **dict(zip(keys, values, strict=True))).set_index("step")
            rows.append([title(*values), *(estimate(cells.loc[step]) for step in steps)])
        return markdown_table([head, *(f"step {step:,}" for step in steps)], rows)

    @cached_property
    def widest(self) -> pd.DataFrame:
        """The rows of the checkpoint at which λ̂ differs most between settings."""
        steps = sorted({int(step) for step in numbers(self.table, "step")})
        return max((rows_where(self.table, step=step) for step in steps), key=_range)

    @property
    def range(self) -> float:
        """By how much λ̂ differs there."""
        return _range(self.widest)

    @property
    def errors(self) -> Comparison:
        """The standard errors there."""
        return Comparison(None, self.widest["llc/mcse"].tolist())

    @property
    def nbeta(self) -> float:
        """nβ of every row."""
        return float((self.table["llc/mean"] / self.table["loss/excess"]).median())


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    grid = {name: Grid(runs[0].folder.parent / "calibration", name) for name in VARIES}
    draws = [each.sampler["num_draws"] for each in grid.values()]
    return {
        "grid": grid,
        "grid_fewest_draws": min(draws),
        "grid_most_draws": max(draws),
        "grid_chains": int(grid["eps_temp_gamma"].table["chains"].iloc[0]),
        "grid_failed": sum(each.failed for each in grid.values()),
        "grid_estimates": sum(len(each.table) for each in grid.values()),
        **_scales(grid["eps_temp_gamma"]),
        **_losses(grid["eval_loss_fn"].table),
        **_still(grid["non_exploration"]),
        "grid_seeds": _seeds(grid["fixed_seed"].table, grid["fresh_seeds"].table),
        "grids_table": markdown_table(
            ["what varies", "table", "draws", "estimates", "a test failed", "diverged"],
            [
                [
                    words,
                    f"`{name}`",
                    str(grid[name].sampler["num_draws"]),
                    str(len(grid[name].table)),
                    str(grid[name].failed),
                    str(grid[name].lost),
                ]
                for name, words in VARIES.items()
            ],
        ),
        "grid_sizes_table": grid["eval_dataset_size"].by_setting("n", "{:,}".format),
        "grid_losses_table": grid["eval_loss_fn"].by_setting("loss", LOSSES.__getitem__),
        "grid_batches_table": grid["eval_minibatch"].by_setting(
            "batch", lambda batch, method: f"{batch:,}, loss on {BATCHES[method]}"
        ),
        "grid_fixed_table": grid["eval_fixed_batch"].by_setting("fixed batch", "{:,}".format),
        "grid_seeds_table": _seeds_table(grid["fixed_seed"].table, grid["fresh_seeds"].table),
    }


def _range(rows: pd.DataFrame) -> float:
    return float(np.ptp(numbers(rows, "llc/mean")))


def _scales(grid: Grid) -> dict[str, object]:
    """How the settings of the grid of scales divide: diverged, worse than predicting 0, better, settled."""
    table = grid.table
    lost = table["llc/mean"].isna()
    below = ~lost & (table["loss/mean"] < table["loss/zero"])
    settled = table[below & (table["llc/rhat"] < RHAT_LIMIT)]
    strongest = table[LOCALISATION] == table[LOCALISATION].max()
    return {
        "scales_count": len(table),
        "scales_step": int(table["step"].iloc[0]),
        "scales_lost": sum(lost),
        "scales_strongest": table[LOCALISATION].max(),
        "scales_lost_strongest": sum(lost & strongest),
        "scales_lost_others": sum(lost & ~strongest),
        "scales_all_strongest": sum(strongest),
        "scales_above": sum(~lost & ~below),
        "scales_below": sum(below),
        "scales_settled": len(settled),
        "scales_settled_at": sorted(set(settled[LOCALISATION])),
        "scales_settled_llc": Comparison(None, settled["llc/mean"].tolist()),
    }


def _losses(table: pd.DataFrame) -> dict[str, object]:
    """How much larger λ̂ is if the first k tokens drive the chains: at every checkpoint, and at the last with its error."""
    both = {loss: rows_where(table, **{LOSS: loss}).set_index("step") for loss in LOSSES}
    gaps = both["subsequence-mse"]["llc/mean"] - both["mse"]["llc/mean"]
    errors = (both["subsequence-mse"]["llc/mcse"] ** 2 + both["mse"]["llc/mcse"] ** 2) ** 0.5
    last = max(gaps.index)
    return {
        "losses_gaps": gaps.tolist(),
        "losses_step": last,
        "losses_gap": gaps[last],
        "losses_gap_error": errors[last],
    }


def _still(grid: Grid) -> dict[str, object]:
    """What the chains without exploration measure."""
    table = grid.table
    return {
        "still_epsilon": grid.sampler["noise_scale"],
        "still_excess": Comparison(None, table["loss/excess"].tolist()),
        "still_heating": Comparison(None, table["noise/heating"].tolist()),
        "still_rhat": table["llc/rhat"].max(),
        "still_spread": sum(table["verdict"].str.startswith("not spread")),
    }


def _seeds(fixed: pd.DataFrame, fresh: pd.DataFrame) -> dict[str, object]:
    """How far estimates with fresh seeds are from those with one seed, and their errors."""
    both = fixed.merge(fresh, on="step", suffixes=("", "/fresh"))
    apart = (both["llc/mean"] - both["llc/mean/fresh"]).abs()
    errors = (both["llc/mcse"] ** 2 + both["llc/mcse/fresh"] ** 2) ** 0.5
    return {
        "number": len(both),
        "most": apart.max(),
        "at": both["step"][apart.idxmax()],
        "most_errors": (apart / errors).max(),
    }


def _seeds_table(fixed: pd.DataFrame, fresh: pd.DataFrame) -> str:
    both = [table.set_index("step") for table in (fixed, fresh)]
    rows = [[f"{step:,}", *(estimate(table.loc[step]) for table in both)] for step in both[0].index]
    return markdown_table(["step", "one seed for all", "a seed for each"], rows)
