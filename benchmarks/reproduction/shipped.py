"""The runs that data/L2H4Minf ships: their rows of the tables, and their checkpoints."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks.reproduction.published import LOW_NOISE
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
from icl.sampling.presets import PUBLISHED, PUBLISHED_TABLE
from icl.storage import LocalStore

PUBLISHED_SEED = 1
"""The model seed of the published figures and table of stages."""

_read = cache(read_table)


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
        """All there are, in the order of their seeds."""
        found = [cls(folder, path.parent.name) for path in folder.glob("checkpoints/icl/*/config.json")]
        return sorted(found, key=lambda run: run.seed)

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
        table = _read(self.folder, name)
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

    @property
    def norms(self) -> pd.Series:
        """‖w_t‖ by step."""
        return self.needed("evals").set_index("step")["weight/norm"]

    def free_distance(self, table: str) -> float:
        """√(P/γ): how far the localisation alone lets the chains behind a table diffuse."""
        return math.sqrt(self.num_parameters / self.sampler(table).localization)

    def last_draw(self, traces: str = "llc_traces") -> int:
        """How many draws each chain of a table of traces has."""
        return int(self.needed(traces)["draw"].max())

    def sampler(self, table: str) -> SamplerConfig:
        """The settings behind a table of estimates."""
        made = json.loads((self.folder / f"{table}.json").read_text())
        return SamplerConfig.model_validate(made["sampler_config"])

    @cached_property
    def low_noise(self) -> ValidationSet:
        """Sequences with the label noise of the reference code's validation set."""
        return ValidationSet.draw(self.config.task_config.true_task(), noise_std=LOW_NOISE)

    def low_noise_errors(self, step: int) -> Tensor:
        """(B,) `squared_errors` on `low_noise`."""
        return self.squared_errors(step, self.low_noise.xs, self.low_noise.ys)

    def after_burnin(self, table: str = "llc") -> pd.DataFrame:
        """λ̂ of a table without the draws that the paper's table of settings calls burn-in (preset `published-table`)."""
        share = PUBLISHED_TABLE.num_burnin_steps / PUBLISHED.num_draws
        return estimates_within(self.needed(f"{table}_traces"), self.needed(table), share)

    @cached_property
    def second_half(self) -> pd.DataFrame:
        """λ̂ under the published settings without the first half of the draws (`icl.analysis.climb.estimates_within`)."""
        return estimates_within(self.needed("llc_traces"), self.needed("llc"))

    def crossings(self, fraction: float) -> pd.DataFrame:
        """How far the loss of the published chains climbs, and when (`icl.analysis.climb.crossing_draws`)."""
        return crossing_draws(self.needed("llc_traces"), self.needed("llc"), fraction)


def detailed(runs: Sequence[Shipped]) -> Shipped:
    """The run that the page shows in detail: it has the most chains, the longest ones, and the number of the published seed."""
    (run,) = (run for run in runs if run.seed == PUBLISHED_SEED)
    return run


def estimate(row: pd.Series) -> str:
    """λ̂ with its standard error."""
    return f"{row['llc/mean']:.1f} ± {row['llc/mcse']:.1f}"


def titles(runs: Sequence[Shipped]) -> list[str]:
    """One column per run."""
    return [f"seed {run.seed}" for run in runs]
