"""The runs that data/L2H4Minf ships: their rows of the tables, their checkpoints, and what changes over the paper's stages."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from icl.analysis.climb import crossing_draws, estimates_within
from icl.analysis.data import AnalysisData
from icl.analysis.run import load_model
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.evals import ValidationSet
from icl.figures.families import read_table, table_names
from icl.model import parameter_layout
from icl.sampling import SamplerConfig
from icl.sampling.verdict import RHAT_LIMIT
from icl.storage import LocalStore

LOW_NOISE = 0.125
"""Standard deviation of the label noise of the reference code's validation set; its training noise has the variance 0.125."""

PUBLISHED_SEED = 1
"""The model seed of the published figures and stage table."""


@dataclass(frozen=True)
class Change:
    """Of λ̂ over a stage.

    Attributes:
        value: of the change.
        error: its standard error.
        disagree: whether chains disagree at an end of the stage (split R̂), which leaves the error without meaning.
    """

    value: float
    error: float
    disagree: bool = False


Changes = dict[str, Change | None]
"""By stage; None where an end has no estimate."""


@dataclass(frozen=True)
class Shipped:
    """One of the shipped runs: its rows of the tables, and its checkpoints.

    Attributes:
        folder: data/L2H4Minf.
        name: of the run.
    """

    folder: Path
    name: str

    @classmethod
    def runs(cls, folder: Path) -> list["Shipped"]:
        """All there are, that of the published seed first."""
        found = [cls(folder, path.parent.name) for path in folder.glob("checkpoints/icl/*/config.json")]
        return sorted(found, key=lambda run: (run.seed != PUBLISHED_SEED, run.seed))

    @property
    def seed(self) -> int:
        """Of the model."""
        seed = self.config.task_config.model_seed
        assert seed is not None
        return seed

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Those that are shipped."""
        return Checkpoints(LocalStore(self.folder / "checkpoints"), self.name)

    @cached_property
    def config(self) -> TrainingConfig:
        """As trained."""
        return TrainingConfig.parse(self.checkpoints.config()).resolved()

    @cached_property
    def data(self) -> AnalysisData:
        """The evaluator's sequences."""
        return AnalysisData(self.config)

    def table(self, name: str) -> pd.DataFrame | None:
        """The run's rows of a table, sorted by step where it has one; None if there are none."""
        if name not in set(table_names(self.folder)):
            return None
        table = read_table(self.folder, name)
        table = table[table["model_seed"] == self.seed]
        if table.empty:
            return None
        return table.sort_values("step", kind="stable", ignore_index=True) if "step" in table else table

    def needed(self, name: str) -> pd.DataFrame:
        """A table that must be there."""
        table = self.table(name)
        if table is None:
            raise ValueError(f"{self.folder} has no {name} of model seed {self.seed}")
        return table

    @torch.no_grad()
    def squared_errors(self, step: int, xs: Tensor, ys: Tensor) -> Tensor:
        """(B,) mean over examples of each sequence's squared error."""
        model = load_model(self.checkpoints, self.config, step)
        parts = [model(a, b) for a, b in zip(xs.split(1024), ys.split(1024), strict=True)]
        return (torch.cat(parts) - ys).square().mean(dim=(1, 2)).double()

    def spans(self) -> list[tuple[int, int]]:
        """From which checkpoint to which, for each stage."""
        return list(pairwise(self.boundaries().values()))

    def boundaries(self) -> dict[str, int]:
        """The measured checkpoint nearest to each published stage end, after the first one, "start"."""
        steps = self.needed("evals")["step"].to_numpy()
        ends = {stage: int(steps[abs(steps - end).argmin()]) for stage, end in PUBLISHED_STAGE_ENDS.items()}
        return {"start": int(steps[0]), **ends}

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(math.prod(size) for _, size in parameter_layout(self.config.task_config.shape).values())

    def sampler(self, table: str) -> SamplerConfig:
        """The settings behind a table of estimates."""
        made = json.loads((self.folder / f"{table}.json").read_text())
        return SamplerConfig.model_validate(made["sampler_config"])

    @cached_property
    def low_noise(self) -> ValidationSet:
        """Sequences of the reference code's validation law."""
        return ValidationSet.draw(self.config.task_config.true_task(), noise_std=LOW_NOISE)

    def low_noise_errors(self, step: int) -> Tensor:
        """(B,) `squared_errors` on `low_noise`."""
        return self.squared_errors(step, self.low_noise.xs, self.low_noise.ys)

    def loss_changes(self) -> list[float]:
        """Of the evaluator's loss, stage by stage."""
        losses = self.needed("evals").set_index("step")["pretrain/mse"]
        return np.diff(losses.loc[list(self.boundaries().values())]).tolist()

    def low_noise_loss_changes(self) -> list[float]:
        """The same on the reference code's validation law."""
        return np.diff([float(self.low_noise_errors(step).mean()) for step in self.boundaries().values()]).tolist()

    def llc_changes(self, name: str) -> Changes:
        """Of a table's estimates between the checkpoints nearest to the published stage ends."""
        return self._changes(self.table(name), name)

    def late_llc_changes(self) -> Changes:
        """The same under the published settings, from the second half of the draws alone."""
        return self._changes(self.second_half, "llc")

    @cached_property
    def second_half(self) -> pd.DataFrame:
        """λ̂ under the published settings without the first half of the draws (`icl.analysis.climb.estimates_within`)."""
        return estimates_within(self.needed("llc_traces"), self.needed("llc"))

    def crossings(self, fraction: float) -> pd.DataFrame:
        """How far the loss of the published chains climbs, and when (`icl.analysis.climb.crossing_draws`)."""
        return crossing_draws(self.needed("llc_traces"), self.needed("llc"), fraction)

    def _changes(self, table: pd.DataFrame | None, name: str) -> Changes:
        """Between the rows of a table; chains disagree where those of all draws do, in the table called `name`."""
        changes: Changes = dict.fromkeys(PUBLISHED_STAGE_ENDS)
        if table is None:
            return changes
        rows, rhat = table.set_index("step"), self.needed(name).set_index("step")["llc/rhat"]
        for stage, ends in zip(PUBLISHED_STAGE_ENDS, self.spans(), strict=True):
            if rows.index.isin(ends).sum() == 2:
                both = rows.loc[list(ends)]
                change = float(both["llc/mean"].iloc[1] - both["llc/mean"].iloc[0])
                changes[stage] = Change(
                    change, float(np.hypot(*both["llc/mcse"])), bool((rhat[list(ends)] > RHAT_LIMIT).any())
                )
        return changes

    def smooth_llc_changes(self, name: str) -> Changes:
        """Of a smooth fit to all estimates of the run (`icl.analysis.stages.stage_table`)."""
        changes: Changes = dict.fromkeys(PUBLISHED_STAGE_ENDS)
        table = self.table("stages")
        rows = pd.DataFrame() if table is None else table[table["setting"] == name]
        for row in rows.itertuples(index=False):
            raw = self.llc_changes(name)[row.stage]
            changes[row.stage] = Change(row.delta_llc, row.delta_llc_std, raw is not None and raw.disagree)
        return changes

    def kinds(self, name: str) -> dict[str, tuple[str, float]]:
        """Stage -> its kind in a table of estimates, and the share of posterior draws that have it."""
        table = self.table("stages")
        rows = pd.DataFrame() if table is None else table[table["setting"] == name]
        return {row.stage: (row.type, row.type_probability) for row in rows.itertuples(index=False)}
