r"""The search for sampler constants on which the estimate hardly depends: one setting for all checkpoints of a run.

A cell is one combination of ε, γ and nβ. Every cell of a grid is sampled at every checkpoint with the same budget, seed and data. The
criterion:

1. A cell is **healthy** at a checkpoint if no test of its verdict failed (`icl.sampling.verdict`): no chain is lost, chains stay in the
   basin, have levelled off and agree, there are enough draws, and λ̂ is not negative and not heated by mini-batches.
2. Two cells **agree** if both are healthy and their λ̂ differ by at most 10 %, or by at most two standard errors of the difference if that
   is more. A cell is insensitive to a constant if it agrees with a neighbour that differs only in that constant. A constant with only one
   value in the grid is not judged. A cell that is sensitive to ε is rejected, because its λ̂ is an artefact of the step size. The cells
   that are insensitive to ε and to γ form the **region of insensitivity**.
3. Candidates are the cells that are in the region at every checkpoint. **Recommended** is the one with the largest nβ (λ̂ is defined in the
   limit of large nβ), then the smallest γ, then the smallest ε. If there is no candidate, the text says so, and the choice is made in the
   same order among the cells that are insensitive to ε at every checkpoint. λ̂ then counts the directions whose curvature nβ h exceeds γ.
   Such an estimate can compare checkpoints under one setting, but is not a property of the model alone. If no cell is left, none is
   recommended.

The criterion uses only health and sensitivity, never the value of an estimate. For each cell, the Metropolis acceptance of one step at
nβ = 0 is computed too (`icl.sampling.checks.control_acceptance`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import pandas as pd

from icl.sampling.config import SamplerConfig
from icl.sampling.llc import Inputs, LLCResult, estimate_llc_of
from icl.sampling.objective import Batch, Objective
from icl.sampling.supply import BatchSource

AGREEMENT = 0.10
TRACE_POINTS = 100
AXES = ("epsilon", "gamma", "nbeta")


@dataclass(frozen=True)
class SearchGrid:
    """The constants to search. The defaults are those of Timaeus' sampling guide (2026)."""

    epsilons: Sequence[float] = (1e-6, 1e-5, 1e-4)
    gammas: Sequence[float] = (10.0, 100.0, 1000.0)
    nbetas: Sequence[float] = (1.0, 10.0, 100.0)

    def cells(self) -> list[tuple[float, float, float]]:
        """All (ε, γ, nβ), each once.

        Raises:
            ValueError: an axis is empty.
        """
        cells = list(dict.fromkeys(product(self.epsilons, self.gammas, self.nbetas)))
        if not cells:
            raise ValueError("give at least one value each of epsilon, gamma and nbeta")
        return cells


@dataclass(frozen=True)
class Target:
    """What is sampled: the loss around one checkpoint, its data, and as `reference_loss` the loss of a useless model."""

    objective: Objective
    batches: BatchSource | Iterable[Batch]
    reference_loss: float | None = None


@dataclass(frozen=True)
class Cell:
    """One setting at one checkpoint.

    Attributes:
        setting: the name of a preset; empty for a cell of the grid.
        step: the checkpoint.
        llc, mcse, rhat, ess: the estimate, its standard error, R̂ and effective sample size.
        excess: E[L] − L(w*).
        distance, lost, acceptance, heating: see `LLCResult`.
        draws: the (thinned) draws at which `running` was taken.
        running: λ̂ so far, one list per chain.
    """

    setting: str
    step: int
    epsilon: float
    gamma: float
    nbeta: float
    llc: float
    mcse: float
    rhat: float
    ess: float
    excess: float
    distance: float
    lost: int
    acceptance: float
    heating: float
    healthy: bool
    verdict: str
    draws: tuple[int, ...]
    running: tuple[tuple[float, ...], ...]

    @property
    def key(self) -> tuple[str, int, float, float, float]:
        """The fields that identify the cell."""
        return self.setting, self.step, self.epsilon, self.gamma, self.nbeta


@dataclass(frozen=True)
class Calibration:
    """A finished search.

    Attributes:
        table: one row per cell and checkpoint: the fields of `Cell` without its trace, and `insensitive_epsilon` and `insensitive` (to ε
            and to γ, by rule 2; False for presets).
        recommended: (ε, γ, nβ), or None.
        region: whether there is a region of insensitivity at every checkpoint.
        text: the finding in words.
    """

    table: pd.DataFrame
    recommended: tuple[float, float, float] | None
    region: bool
    text: str

    @property
    def traces(self) -> list[Cell]:
        """The cells of the table."""
        return list(self.table.attrs["cells"])


def calibrate(
    targets: Mapping[int, Target],
    base: SamplerConfig,
    grid: SearchGrid,
    presets: Mapping[str, SamplerConfig] | None = None,
    *,
    done: Iterable[Cell] = (),
    record: Callable[[Cell], None] = lambda cell: None,
) -> Calibration:
    """Sample every cell of the grid and every preset at every checkpoint, and apply the criterion.

    Args:
        targets: checkpoint -> what is sampled there.
        base: kernel, budget (chains, draws, burn-in, batches) and seed of every cell. Its constants are replaced.
        grid: the constants to search.
        presets: settings that are reported beside the grid, with the base's budget. They cannot be recommended.
        done: cells of an earlier, interrupted call with the same base. They are not sampled again.
        record: called with every new cell.
    """
    settings = [("", cell_config(base, cell)) for cell in grid.cells()]
    settings += [(name, with_constants_of(base, preset)) for name, preset in (presets or {}).items()]
    known = {cell.key: cell for cell in done}
    cells = []
    for step, target in targets.items():
        for name, config in settings:
            assert config.step_size is not None
            key = (name, step, config.step_size, config.localization, config.inverse_temperature)
            if key not in known:
                inputs = Inputs(target.batches, reference_loss=target.reference_loss)
                result = estimate_llc_of(target.objective, inputs, config)
                known[key] = _cell(name, step, config, result)
                record(known[key])
            cells.append(known[key])
    return conclude(cells)


def cell_config(base: SamplerConfig, cell: tuple[float, float, float], method: str | None = None) -> SamplerConfig:
    """The base with the constants (ε, γ, nβ) of the cell, and a kernel or its own. If the base has no step size, its kernel "auto" stays
    "langevin"."""
    free = dict.fromkeys(("gradient_scale", "localization_scale", "noise_scale", "temperature"))
    kept = {"sampling_method": method or base.method, "init_seed": base.init_seed or 0}
    return SamplerConfig.parse(base.model_dump() | free | kept | dict(zip(AXES, cell, strict=True)))


def with_constants_of(base: SamplerConfig, preset: SamplerConfig) -> SamplerConfig:
    """The base's budget with a preset's kernel and constants.

    Raises:
        ValueError: the preset has no step size, because pilot chains find it.
    """
    if preset.step_size is None:
        raise ValueError(
            "this preset finds its constants by pilot chains; only a preset with epsilon can be compared on a grid"
        )
    cell = preset.step_size, preset.localization, preset.inverse_temperature
    return cell_config(base, cell, preset.method)


def _cell(name: str, step: int, config: SamplerConfig, result: LLCResult) -> Cell:
    assert config.step_size is not None
    every = -(-result.running.shape[1] // TRACE_POINTS)
    return Cell(
        setting=name, step=step, epsilon=config.step_size, gamma=config.localization, nbeta=config.inverse_temperature,
        llc=result.llc_mean, mcse=result.llc_mcse, rhat=result.llc_rhat, ess=result.llc_ess,
        excess=result.mean_loss - result.init_loss, distance=result.distance, lost=result.num_lost,
        acceptance=result.control_acceptance, heating=result.noise_heating, healthy=result.verdict.sound,
        verdict=result.verdict.text, draws=tuple(range(0, result.running.shape[1], every)),
        running=tuple(tuple(chain) for chain in result.running[:, ::every].tolist()),
    )  # fmt: skip


def conclude(cells: Sequence[Cell]) -> Calibration:
    """Judge sampled cells by the rules of the module's docstring."""
    rows = []
    for cell in cells:
        row = {name: value for name, value in asdict(cell).items() if name not in ("draws", "running")}
        along = {axis: not cell.setting and _insensitive(cell, cells, axis) for axis in ("epsilon", "gamma")}
        rows.append(row | {"insensitive_epsilon": along["epsilon"], "insensitive": all(along.values())})
    table = pd.DataFrame(rows)
    table.attrs["cells"] = tuple(cells)
    region, stable = _everywhere(table, "insensitive"), _everywhere(table, "insensitive_epsilon")
    chosen = min(region or stable, key=lambda cell: (-cell[2], cell[1], cell[0]), default=None)
    return Calibration(table, chosen, bool(region), _finding(table, region, stable, chosen))


def _insensitive(cell: Cell, cells: Iterable[Cell], axis: str) -> bool:
    """Whether a cell is healthy and agrees with a neighbour along the axis, if the axis has several values."""
    fixed = [name for name in ("setting", "step", *AXES) if name != axis]
    line = [other for other in cells if all(getattr(other, name) == getattr(cell, name) for name in fixed)]
    line.sort(key=lambda other: getattr(other, axis))
    place = line.index(cell)
    neighbours = line[max(place - 1, 0) : place] + line[place + 1 : place + 2]
    return cell.healthy and (not neighbours or any(_agree(cell, other) for other in neighbours))


def _agree(cell: Cell, other: Cell) -> bool:
    tolerance = max(AGREEMENT * abs(cell.llc), 2 * math.hypot(cell.mcse, other.mcse))
    return other.healthy and abs(cell.llc - other.llc) <= tolerance


def _everywhere(table: pd.DataFrame, column: str) -> list[tuple[float, float, float]]:
    """The cells of the grid for which the column holds at every checkpoint."""
    grid = table[table["setting"] == ""]
    holds = grid.groupby(list(AXES))[column].all()
    return [cell for cell, value in holds.items() if value]  # type: ignore[misc]


def _finding(
    table: pd.DataFrame,
    region: Sequence[tuple[float, float, float]],
    stable: Sequence[tuple[float, float, float]],
    chosen: tuple[float, float, float] | None,
) -> str:
    grid: Any = table[table["setting"] == ""]
    total = len(grid.drop_duplicates(list(AXES)))
    if chosen is None:
        healthy = len(_everywhere(table, "healthy"))
        return (
            f"no recommendation: of {total} cells {healthy} are healthy at every checkpoint, and none agrees with its "
            "neighbour in epsilon; search smaller epsilon, larger gamma, or with more draws"
        )
    epsilon, gamma, nbeta = chosen
    setting = f"epsilon {epsilon:g}, gamma {gamma:g}, nbeta {nbeta:g}"
    if region:
        return f"region of insensitivity: {len(region)} of {total} cells at every checkpoint; recommended: {setting}"
    return (
        f"no region of insensitivity: none of {total} cells is insensitive to gamma at every checkpoint. "
        f"{len(stable)} are healthy and insensitive to epsilon at every checkpoint; recommended among them: {setting}. "
        "The estimates compare checkpoints under this one setting and would differ under another"
    )
