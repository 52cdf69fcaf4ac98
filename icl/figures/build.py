"""Draw every figure from the tables in data/, for `icl figures`.

Figures of one run go to figures/<family>-seed-<s>/, those of several runs to figures/<family>/. A figure whose tables are
missing is left out, and a line says so.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from icl.analysis.stages import FEWEST_ESTIMATES, PUBLISHED_STAGE_ENDS, detectable, find_boundaries
from icl.figures.elements import FIRST_STEP, NO_STAGES, StageEnds, Stages, numbers
from icl.figures.families import (
    Tables,
    command_for,
    is_the_papers,
    keys_of_runs,
    read_tables,
    run_label,
    runs_of,
    table_names,
    tables_of_run,
    unlike_the_runs,
)
from icl.figures.recipes import FAMILY_RECIPES, GRID_RECIPES, RECIPES, RUN_RECIPES, Recipe
from icl.figures.style import save

logger = logging.getLogger(__name__)

Report = Callable[[str], None]

_NOTEBOOK_DPI = 130  # labels of 8 points must be readable; more would make the committed outputs large


StageChoice = Literal["found", "paper", "none"]
"""The stages in figures: those found in each run's own λ̂, those of arXiv 2402.02364, or none."""

PAPER_STAGES = StageEnds(dict(PUBLISHED_STAGE_ENDS), first=FIRST_STEP, exact=True)


def build_figures(
    data: Path, output: Path, report: Report = logger.info, jobs: int = 1, stages: StageChoice = "found"
) -> list[Path]:
    """Draw every figure whose tables exist, as PNG and PDF; returns the files, in order.

    The same tables give the same bytes, whatever the number of processes.

    Args:
        data: the folder of a family's tables, or a folder of such folders.
        output: the folder for figures.
        report: called with one line for each figure drawn or left out.
        jobs: number of processes that draw. 1 means this process.
        stages: which stages to shade. The paper's are shown only for the paper's model.

    Raises:
        ValueError: there is no table at all.
    """
    families = families_in(data)
    if not families:
        raise ValueError(
            f"there are no tables in {data} or in its folders; make them with: icl tabulate SWEEP --output {data}"
        )
    tasks = [task for family in families for task in _tasks(family, output, _choice(family, stages, report), report)]
    written: list[Path] = []
    with _processes(jobs) as apply:
        for lines, paths in apply(_draw_task, tasks):
            for line in lines:
                report(line)
            written += paths
    return written


def families_in(data: Path) -> list[Path]:
    """The families of a folder: the folder itself if it holds tables for figures, otherwise its subfolders that do."""
    drawable = {name for recipe in RECIPES.values() for name in recipe.needs}
    own = data.resolve() if drawable.intersection(table_names(data)) else None
    if own is not None:
        return [own]
    return [folder for folder in sorted(data.glob("*")) if drawable.intersection(table_names(folder))]


def _choice(family: Path, stages: StageChoice, report: Report) -> StageChoice:
    if stages != "paper" or is_the_papers(family):
        return stages
    report(f"{family.name} is not the paper's model, so its figures show the stages found in its own λ̂, not LR1 to LR5")
    return "found"


def stages_of(tables: Tables, choice: StageChoice) -> StageEnds:
    """The stages of one run, and the first step of its figures.

    If a curve has enough estimates, stages are found by `icl.analysis.stages.find_boundaries`. They are called S1, S2, ...
    """
    if choice == "paper":
        return PAPER_STAGES
    steps = np.concatenate(
        [numbers(tables[name], "step") for name in ("losses", "llc") if name in tables] or [np.ones(1)]
    )
    first, last = float(steps[steps > 0].min(initial=steps.max(initial=1))), float(steps.max())
    boundaries = [] if choice == "none" else _boundaries(tables)
    ends = [*boundaries, last + 1] if boundaries else []
    return StageEnds({f"S{number}": end for number, end in enumerate(ends, start=1)}, first)


def _boundaries(tables: Tables) -> list[float]:
    """Those of the first curve that has enough estimates."""
    for name in ("llc", "llc_calibrated"):
        if name not in tables:
            continue
        curve = detectable(tables[name])
        if len(curve) >= FEWEST_ESTIMATES and curve["step"].is_unique:
            return find_boundaries(curve["step"], curve["llc/mean"], curve["llc/mcse"]).steps.tolist()
    return []


def draw(name: str, tables: Tables, report: Report = print, stages: Stages = NO_STAGES) -> Figure | None:
    """One figure by its name, for notebooks. If a table is missing, the reason is reported and the result is None.

    Args:
        name: a name in `RECIPES`.
        tables: the tables of one run for a name in `RUN_RECIPES`, otherwise those of the family.
        report: called with the reason if the figure cannot be drawn.
        stages: the end of each stage.

    Raises:
        ValueError: no figure has this name.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no figure {name!r}; known: {', '.join(sorted(RECIPES))}")
    figure = _attempt(RECIPES[name], tables, "notebook", report, stages)
    if figure is not None:
        figure.set_dpi(_NOTEBOOK_DPI)
    return figure


@dataclass(frozen=True)
class _Task:
    """One figure to draw: its name, the tables it needs, and the folder for its files."""

    name: str
    tables: Tables
    folder: Path
    stages: Stages


def _tasks(family: Path, output: Path, choice: StageChoice, report: Report) -> Iterator[_Task]:
    tables = read_tables(family, report)
    # Runs of a family have different stages. Only the paper's stages are common to all of them.
    common = stages_of(tables, "paper" if choice == "paper" else "none")
    for recipes in (FAMILY_RECIPES, GRID_RECIPES):
        yield from _tasks_of(recipes, tables, output / family.name, common)
    recipes = _of_single_runs(family, tables, report)
    runs = runs_of(tables)
    for run in runs:
        own = tables_of_run(tables, run)
        folder = output / f"{family.name}-{run_label(run, among=runs)}"
        yield from _tasks_of(recipes, own, folder, stages_of(own, choice))


def _of_single_runs(family: Path, tables: Tables, report: Report) -> list[Recipe]:
    """The figures of a run, without those whose tables do not tell the runs apart. A line names these tables."""
    needed = {name for recipe in RUN_RECIPES for name in recipe.needs}
    unlike = {name: keys for name, keys in unlike_the_runs(tables).items() if name in needed}
    if unlike:
        keys = keys_of_runs(tables)
        whole = next(name for name in tables if name not in unlike and set(keys) <= set(tables[name].columns))
        of = ", ".join(f"{name} has the keys {', '.join(own)}" for name, own in unlike.items())
        report(
            f"{family.name}: no figure of a single run shows {', '.join(unlike)}. {of}; {whole} has {', '.join(keys)}. Use one folder for "
            "each run"
        )
    return [recipe for recipe in RUN_RECIPES if not unlike.keys() & set(recipe.needs)]


def _tasks_of(recipes: Sequence[Recipe], tables: Tables, folder: Path, stages: Stages) -> Iterator[_Task]:
    """A task for each figure of a group; none if there is no table for any of them, as for the figures of grids without a grid."""
    if not any(name in tables for recipe in recipes for name in recipe.needs):
        return
    for recipe in recipes:
        yield _Task(recipe.name, {name: tables[name] for name in recipe.needs if name in tables}, folder, stages)


@contextmanager
def _processes(jobs: int) -> Iterator[Callable[..., Iterator[tuple[list[str], list[Path]]]]]:
    """A `map` that uses this many processes."""
    if jobs == 1:
        yield map
        return
    # Spawned, because a fork would copy locks that other threads of this process hold.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield pool.map


def _draw_task(task: _Task) -> tuple[list[str], list[Path]]:
    """Draw one figure; returns the lines to report, and the files."""
    lines: list[str] = []
    figure = _attempt(RECIPES[task.name], task.tables, task.folder.name, lines.append, task.stages)
    if figure is None:
        return lines, []
    return [*lines, f"drew {task.folder.name}/{task.name}"], save(figure, task.folder, task.name)


def _attempt(recipe: Recipe, tables: Tables, family: str, report: Report, stages: Stages) -> Figure | None:
    """The figure, or None after reporting one line with the reason."""
    missing = [name for name in recipe.needs if name not in tables]
    if missing:
        report(f"left out {family}/{recipe.name}: no {missing[0]} table; make it with: {command_for(missing[0])}")
        return None
    try:
        options = {"stages": stages} if "stages" in signature(recipe.draw).parameters else {}
        return recipe.draw(*(tables[name] for name in recipe.needs), **options)
    except ValueError as error:
        # A table that is too short for one figure must not stop the others.
        report(f"left out {family}/{recipe.name}: {error}")
    except KeyError as error:
        report(f"left out {family}/{recipe.name}: the table has no column {error}")
    return None
