"""`icl calibrate`: searches for the sampler's constants at checkpoints of a trained run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from icl.config.steps import refuse_missing_steps
from icl.config.sweeps import load_sweep
from icl.devices import available_cores
from icl.estimation import LLCConfig
from icl.estimation.estimate import estimates_of
from icl.execution.forecast import measured_estimate
from icl.execution.llc_run import subject_of
from icl.execution.names import attempt, distinct, numbered
from icl.execution.points import llc_settings
from icl.execution.progress import progress_bar
from icl.execution.surroundings import Surroundings
from icl.sampling import PRESETS, SamplerConfig
from icl.sampling.calibration import AXES, Calibration, Cell, SearchGrid, Target, calibrate
from icl.sampling.transformer_objective import make_objective
from icl.storage.files import write_table
from icl.storage.jsonl import JsonLines, Row, read_json_lines
from icl.storage.locks import exclusive
from icl.subjects import Subject, inputs_of
from icl.subjects.digest import DIGEST, weights_digest

MOST_CHECKPOINTS = 4
SHOWN = {
    "setting": "s", "step": "d", "epsilon": "g", "gamma": "g", "nbeta": "g", "llc": ".1f", "mcse": ".2g", "rhat": ".3f", "ess": ".0f",
    "excess": ".3g", "distance": ".3g", "lost": "d", "acceptance": ".2f", "heating": ".2g", "insensitive_epsilon": "", "insensitive": "",
    "verdict": "s",
}  # fmt: skip
NUMBERS = dict.fromkeys(("step", "epsilon", "gamma", "nbeta", "llc", "mcse", "rhat", "ess"), (int, float))


@dataclass(frozen=True)
class Budget:
    """Chains and draws of every cell of the search, used instead of the sweep file's."""

    chains: int = 4
    burnin: int = 200
    draws: int = 300

    def gradients(self, cells: int) -> int:
        """The number of gradients that `cells` cells cost."""
        return cells * self.chains * (self.burnin + self.draws)


def say_cost(
    sweep: Path, index: int, overrides: Sequence[str], steps: Sequence[int], grid: SearchGrid, budget: Budget
) -> None:
    """Print what `calibrate_command` would do and how long it would take here. It samples for a moment only.

    Raises:
        ConfigError: see `calibrate_command`.
    """
    config, place, subject, chosen, sampler = _prepared(sweep, index, overrides, steps, grid, budget)
    config = config.model_copy(update={"sampler_config": sampler})
    place = replace(place, threads=available_cores(place.device))
    model = subject.model(chosen[-1]).to(place.device)
    cells = len(chosen) * (len(grid.cells()) + len(_presets()))
    print(f"{config.subject_name}: {cells} cells (grid and presets, checkpoints {', '.join(map(str, chosen))})")
    begun, step_s, count = measured_estimate(
        config,
        lambda each, watch: next(estimates_of(each, subject, chosen[-1:], [model], place.device, watch)),
        place,
    )
    seconds = round(len(chosen) * begun + cells * count * step_s)
    print(
        f"about {timedelta(seconds=max(seconds, 1))} on this machine's {place.device}, measured now; other work on it makes it longer"
    )


def _presets() -> dict[str, SamplerConfig]:
    return {name: preset for name, preset in PRESETS.items() if preset.step_size and preset.estimator == "standard"}


def _prepared(
    sweep: Path, index: int, overrides: Sequence[str], steps: Sequence[int], grid: SearchGrid, budget: Budget
) -> tuple[LLCConfig, Surroundings, Subject, list[int], SamplerConfig]:
    """The point of the sweep, its surroundings, its subject, the checkpoints to search at, and the sampler with the budget.

    Raises:
        ConfigError: see `calibrate_command`.
    """
    for cell in grid.cells():
        SamplerConfig.parse(dict(zip(AXES, cell, strict=True)))
    points = [attempt(LLCConfig.parse, data) for data in llc_settings(load_sweep(sweep), overrides)]
    config = numbered(distinct(points), index)
    place = Surroundings.from_environment()
    config = config.of(place.with_kept_seed(config.training))
    subject = subject_of(config, place)
    present = subject.steps()
    refuse_missing_steps(steps, present, config.subject_name)
    chosen = list(steps) or _spread(config.chosen_steps(present))
    sampler = config.sampler_config.model_copy(
        update={
            "num_chains": budget.chains, "num_burnin_steps": budget.burnin, "num_draws": budget.draws, "num_burn_in": None,
            "target_error": None,
            "init_seed": config.sampler_config.init_seed or 0, "cores": available_cores(place.device),
        }
    )  # fmt: skip
    return config, place, subject, chosen, sampler


def calibrate_command(
    sweep: Path,
    index: int,
    overrides: Sequence[str],
    steps: Sequence[int],
    grid: SearchGrid,
    budget: Budget,
    output: Path,
) -> Calibration:
    """Search at the checkpoints that the sweep chooses, print the table and draw the traces.

    The folder `output` gets `calibration.csv`, `traces-<step>.png` and `cells.jsonl`. From the last, an interrupted search continues.

    Raises:
        ConfigError: the sweep, an override, a constant of the grid or the choice of checkpoints is wrong, or the run has no checkpoints.
        RunInUseError: another search writes to the folder.
    """
    config, place, subject, chosen, sampler = _prepared(sweep, index, overrides, steps, grid, budget)
    targets = {step: _target(subject, step, sampler, place.device) for step in chosen}
    presets = _presets()
    cells = len(chosen) * (len(grid.cells()) + len(presets))
    of_size = f" of {sampler.grad_batch_size} sequences" if config.is_regression else ""
    print(
        f"{config.subject_name}: {cells} cells (grid and presets, checkpoints {', '.join(map(str, chosen))}), "
        f"{budget.gradients(cells):,} gradients{of_size}"
    )
    about = (
        {"training": config.training.identity(), **config.decisive("grad_tasks", "eval_tasks")}
        if config.is_regression
        else {"subject": config.subject, "subject_config": config.subject_config}
    )
    made = {
        "run": config.subject_name,
        **about,
        "sampler": sampler.model_dump(mode="json", exclude={"cores"}),
    }
    with exclusive(output / ".lock", f"the folder {output}"), progress_bar("calibrating", cells) as update:
        digests = {} if config.is_regression else {step: weights_digest(subject.model(step)) for step in chosen}
        journal = _Journal(output / "cells.jsonl", made, digests)
        done = len(journal.cells)

        def record(cell: Cell) -> None:
            nonlocal done
            done += 1
            journal.append(cell)
            update(done, f"step {cell.step}, ε {cell.epsilon:g}, γ {cell.gamma:g}, nβ {cell.nbeta:g}")

        found = calibrate(targets, sampler, grid, presets, done=journal.cells, record=record)
        write_table(found.table, output / "calibration.csv", digits=6)
    print(shown(found.table))
    _draw(found, output)
    print(found.text)
    return found


def _target(subject: Subject, step: int, sampler: SamplerConfig, device: torch.device) -> Target:
    inputs = inputs_of(subject, step, sampler, device)
    objective = make_objective(subject.model(step).to(device), subject.loss, sampler)
    return Target(objective, inputs.batches, inputs.reference_loss)


def shown(table: pd.DataFrame) -> str:
    """The table as text for printing."""
    columns = {
        name: [format(value, form) if form else str(value) for value in table[name].tolist()]
        for name, form in SHOWN.items()
    }
    return pd.DataFrame(columns).to_string(index=False)


def _spread(steps: Sequence[int]) -> list[int]:
    """At most MOST_CHECKPOINTS of the steps, including the first and the last."""
    if len(steps) <= MOST_CHECKPOINTS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (MOST_CHECKPOINTS - 1))] for i in range(MOST_CHECKPOINTS)]


def _draw(found: Calibration, output: Path) -> None:
    from icl.figures.calibration import calibration_traces
    from icl.figures.style import save

    for step in found.table["step"].unique():
        for path in save(calibration_traces(found, int(step)), output, f"traces-{step}", ("png",)):
            print(path)


class _Journal:
    """The file of finished cells, of all searches. A head line holds the settings of each search. Every cell names its
    search, so that a damaged line loses only itself. A cell at other weights than those of its step in `digests` does not count."""

    def __init__(self, path: Path, made: Mapping[str, Any], digests: Mapping[int, str]) -> None:
        self._digests = digests
        self._search = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
        head = {"search": self._search, **made}
        rows = read_json_lines(path, _is_head_or_cell)
        own = [row for row in rows if row.get("search") == self._search and "sampler" not in row]
        self.cells = [_cell(row) for row in own if row.get(DIGEST) in (None, digests.get(row["step"]))]
        self._lines = JsonLines(path, sound=_is_head_or_cell)
        if head not in rows:
            self._lines.append(head)

    def append(self, cell: Cell) -> None:
        """Add a cell of this search."""
        digest = {DIGEST: self._digests[cell.step]} if self._digests else {}
        self._lines.append({"search": self._search, **digest, **asdict(cell)})


def _is_head_or_cell(row: Row) -> bool:
    try:
        return "sampler" in row or all(
            isinstance(getattr(_cell(row), name), kind) for name, kind in {**NUMBERS, "setting": str}.items()
        )
    except (TypeError, KeyError):
        return False


def _cell(row: Mapping[str, Any]) -> Cell:
    fields = {name: value for name, value in row.items() if name not in ("search", DIGEST)}
    draws, running = tuple(fields["draws"]), tuple(tuple(chain) for chain in fields["running"])
    return Cell(**{**fields, "draws": draws, "running": running})
