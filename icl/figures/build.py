"""Draw every figure from the tables under data/: `icl figures`.

Figures of one run go to figures/<family>-seed-<s>/, those of several runs to figures/<family>/. A figure whose tables are
not there is left out, with a line that says so.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from matplotlib.figure import Figure

from icl.figures.families import (
    Tables,
    command_for,
    read_tables,
    seeds_of,
    table_names,
    tables_of_seed,
    tables_of_subjects,
)
from icl.figures.recipes import FAMILY_RECIPES, RECIPES, RUN_RECIPES, SUBJECT_RECIPES, Recipe
from icl.figures.style import save

logger = logging.getLogger(__name__)

Report = Callable[[str], None]

_NOTEBOOK_DPI = 80  # outputs of notebooks are committed; they should stay small


def build_figures(data: Path, output: Path, report: Report = logger.info, jobs: int = 1) -> list[Path]:
    """Draw every figure whose tables exist, as PNG and PDF; returns the files, in order.

    The same tables give the same bytes, whatever the number of processes.

    Args:
        data: the folder of families.
        output: the folder for figures.
        report: called with one line for each figure drawn or left out.
        jobs: processes to draw in; 1 is this one.

    Raises:
        ValueError: there is no table at all.
    """
    drawable = {name for recipe in RECIPES.values() for name in recipe.needs}
    families = [folder for folder in sorted(data.glob("*")) if drawable.intersection(table_names(folder))]
    if not families:
        raise ValueError(f"no tables under {data}; a family is a folder with files such as evals.csv")
    tasks = [task for family in families for task in _tasks(family, output)]
    written: list[Path] = []
    with _processes(jobs) as apply:
        for lines, paths in apply(_draw_task, tasks):
            for line in lines:
                report(line)
            written += paths
    return written


def draw(name: str, tables: Tables, report: Report = print) -> Figure | None:
    """One figure by its name, for notebooks: of one run if the name is in `RUN_RECIPES`, else of the family.

    None, after saying why, if a table is missing.

    Raises:
        ValueError: no figure has this name.
    """
    if name not in RECIPES:
        raise ValueError(f"no figure {name!r}; there are: {', '.join(sorted(RECIPES))}")
    figure = _attempt(RECIPES[name], tables, "notebook", report)
    if figure is not None:
        figure.set_dpi(_NOTEBOOK_DPI)
    return figure


@dataclass(frozen=True)
class _Task:
    """One figure to draw: its recipe, the tables it needs, and the folder for its files."""

    recipe: Recipe
    tables: Tables
    folder: Path


def _tasks(family: Path, output: Path) -> Iterator[_Task]:
    tables = read_tables(family)
    subjects = tables_of_subjects(tables)
    for name, own in subjects.items():
        yield from _tasks_of(SUBJECT_RECIPES, own, output / "-".join(filter(None, (family.name, name))))
    if subjects:
        return
    yield from _tasks_of(FAMILY_RECIPES, tables, output / family.name)
    for seed in seeds_of(tables):
        yield from _tasks_of(RUN_RECIPES, tables_of_seed(tables, seed), output / f"{family.name}-seed-{seed}")


def _tasks_of(recipes: Sequence[Recipe], tables: Tables, folder: Path) -> Iterator[_Task]:
    for recipe in recipes:
        yield _Task(recipe, {name: tables[name] for name in recipe.needs if name in tables}, folder)


@contextmanager
def _processes(jobs: int) -> Iterator[Callable[..., Iterator[tuple[list[str], list[Path]]]]]:
    """A `map` over this many processes."""
    if jobs == 1:
        yield map
        return
    # A fork would copy the threads' locks of whoever called us; spawned processes start clean everywhere.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield pool.map


def _draw_task(task: _Task) -> tuple[list[str], list[Path]]:
    """What there is to say, and the files."""
    lines: list[str] = []
    figure = _attempt(task.recipe, task.tables, task.folder.name, lines.append)
    if figure is None:
        return lines, []
    return [*lines, f"drew {task.folder.name}/{task.recipe.name}"], save(figure, task.folder, task.recipe.name)


def _attempt(recipe: Recipe, tables: Tables, family: str, report: Report) -> Figure | None:
    """The figure, or None and one line that says why not."""
    missing = [name for name in recipe.needs if name not in tables]
    if missing:
        report(f"left out {family}/{recipe.name}: no {missing[0]} table; make it with: {command_for(missing[0])}")
        return None
    try:
        return recipe.draw(*(tables[name] for name in recipe.needs))
    except ValueError as error:
        # A table that is too short for one figure must not cost the others.
        report(f"left out {family}/{recipe.name}: {error}")
    except KeyError as error:
        report(f"left out {family}/{recipe.name}: the table has no column {error}")
    return None
