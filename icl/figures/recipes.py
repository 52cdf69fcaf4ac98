"""Every figure from the tables under data/: `icl figures`.

A family is a folder of tables, such as data/L2H4Minf with `evals.csv` or `evals.csv.gz`. Figures of one run go to
figures/<family>-seed-<s>/, those of several runs to figures/<family>/. A figure whose tables are not there is left out, and said so.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from icl.analysis.essential_dynamics import NUM_EQUAL_STEPS
from icl.analysis.gaussian_process import smooth_curve
from icl.analysis.geometry import detect_forms, geometry_table
from icl.analysis.smoothing import local_scatter, sigma_ramp, variable_gaussian_filter
from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.analysis.structure import layer_norm_statistics
from icl.analysis.transient_ridge import critical_steps
from icl.figures import (
    attention,
    behaviour,
    chains,
    curvature,
    development,
    essential_dynamics,
    robustness,
    structure,
    task_families,
)
from icl.figures.elements import Stages, in_order, numbers, rows_where
from icl.figures.style import save

logger = logging.getLogger(__name__)

Tables = Mapping[str, pd.DataFrame]
Report = Callable[[str], None]

_FEWEST_TO_FIT = 3
_FEWEST_FOR_FORMS = 500  # checkpoints; published are 5000
# Published for NUM_EQUAL_STEPS checkpoints: first width, last width, and the index where that is reached.
_SMOOTHING = np.array([1.0, 60.0, 200.0])
_SHOWN_SHARE = 0.6  # of the trajectory, in the figure of its geometry: published are 3000 of 5000 checkpoints
_NOTEBOOK_DPI = 80  # outputs of notebooks are committed; they should stay small


@dataclass(frozen=True)
class Recipe:
    """How one figure is made.

    Attributes:
        name: of the file.
        needs: the tables, by the names of their files.
        draw: from these tables.
    """

    name: str
    needs: tuple[str, ...]
    draw: Callable[[Tables], Figure]


COMMANDS = {
    "llc": "icl llc SWEEP, then icl tabulate SWEEP --output data/FAMILY",
    "llc_traces": "icl llc SWEEP, then icl tabulate SWEEP --output data/FAMILY",
    "llc_calibrated": "icl llc SWEEP, then icl tabulate SWEEP --name llc_calibrated --output data/FAMILY",
    "llc_calibrated_traces": "icl llc SWEEP, then icl tabulate SWEEP --name llc_calibrated --output data/FAMILY",
    "llc_long": "icl llc SWEEP, then icl tabulate SWEEP --name llc_long --output data/FAMILY",
    "llc_long_traces": "icl llc SWEEP, then icl tabulate SWEEP --name llc_long --output data/FAMILY",
    "rllc": "icl llc sweeps/analysis/2-L2H4-rllcs-inclusions.yaml, one group of parameters per run",
    "transient_distances": "icl.analysis.transient_ridge over the runs of sweeps/training-runs/transient-ridge.yaml",
    "transient_scores": "icl.analysis.transient_ridge over the runs of sweeps/training-runs/transient-ridge.yaml",
    "transient_llc": "icl llc over the runs of sweeps/training-runs/transient-ridge.yaml",
    "stages": "icl stages data/FAMILY",
    "boundaries": "icl stages data/FAMILY",
}
"""The command that makes a table; an analysis of its own name makes any other."""


def command_for(table: str) -> str:
    """The command that makes a table of a family."""
    return COMMANDS.get(table, f"icl analyse RUN --only {table} --output data/FAMILY")


def run_recipes(stages: Stages = PUBLISHED_STAGE_ENDS) -> list[Recipe]:
    """The figures of one run (one model seed)."""
    recipes = [
        Recipe(
            "loss-and-llc", ("evals", "llc"), lambda t: development.loss_and_llc(t["evals"], t["llc"], stages=stages)
        ),
        Recipe(
            "loss-and-llc-calibrated",
            ("evals", "llc_calibrated"),
            lambda t: development.loss_and_llc(t["evals"], t["llc_calibrated"], stages=stages),
        ),
        Recipe("llc-settings", ("llc", "llc_calibrated", "evals"), lambda t: compared_settings(t, stages)),
        Recipe("llc-traces", ("llc_traces", "llc"), lambda t: chains.relaxation(t["llc_traces"], t["llc"])),
        Recipe(
            "llc-calibrated-traces",
            ("llc_calibrated_traces", "llc_calibrated"),
            lambda t: chains.relaxation(t["llc_calibrated_traces"], t["llc_calibrated"]),
        ),
        Recipe(
            "behavioural-detail",
            ("evals", "llc"),
            lambda t: development.behavioural_detail(fitted_curves(t), stages=stages),
        ),
        Recipe("behavioural", ("evals",), lambda t: behaviour.behavioural(t["evals"], stages=stages)),
        Recipe("prior-distance", ("task_prior",), lambda t: behaviour.prior_distance(t["task_prior"], stages=stages)),
        Recipe("icl-scores", ("evals",), lambda t: behaviour.icl_scores(t["evals"], stages=stages)),
        Recipe("token-losses", ("evals",), lambda t: behaviour.token_losses(t["evals"], stages=stages)),
        Recipe("geometric", ("llc", "hessian"), lambda t: curvature.geometric(t["llc"], t["hessian"], stages=stages)),
        Recipe("hessian", ("hessian",), lambda t: curvature.hessian(t["hessian"], stages=stages)),
        Recipe("embed-collapse", ("spectra",), lambda t: structure.embed_collapse(t["spectra"], stages=stages)),
        Recipe(
            "unembed-collapse", ("layer_norm",), lambda t: structure.unembed_collapse(t["layer_norm"], stages=stages)
        ),
        Recipe(
            "LN-collapse",
            ("layer_norm",),
            lambda t: structure.norm_collapse(layer_norm_statistics(t["layer_norm"]), stages=stages),
        ),
        Recipe(
            "LN-collapse-detail",
            ("layer_norm",),
            lambda t: structure.norm_collapse_detail(t["layer_norm"], stages=stages),
        ),
        Recipe(
            "LN-collapse-and-hessian",
            ("layer_norm", "hessian"),
            lambda t: structure.norm_collapse_and_hessian(t["layer_norm"], t["hessian"], stages=stages),
        ),
        Recipe("attn-roles", ("attention",), lambda t: attention.identified_heads(t["attention"], stages=stages)),
        Recipe(
            "ED-planes",
            ("essential_dynamics",),
            lambda t: essential_dynamics.planes(functional_trajectory(t), stages=stages),
        ),
        Recipe("ED-variants", ("trajectory",), lambda t: essential_dynamics.planes(t["trajectory"], stages=stages)),
        Recipe("ED-evolutes", ("essential_dynamics",), lambda t: evolutes_of(functional_trajectory(t), stages)),
        Recipe(
            "ED-components",
            ("essential_dynamics",),
            lambda t: essential_dynamics.components_over_time(
                functional_trajectory(t), forms_of(functional_trajectory(t)), stages=stages
            ),
        ),
        Recipe("gain-sweep", ("gain_sweep",), lambda t: robustness.gain_sweep(t["gain_sweep"])),
        Recipe(
            "effective-task",
            ("effective_task",),
            lambda t: robustness.effective_task(t["effective_task"], stages=stages),
        ),
        Recipe("distance-to-ridge", ("evals",), lambda t: behaviour.distance_to_optimum(t["evals"], stages=stages)),
        Recipe("rllc", ("rllc",), lambda t: chains.restricted(t["rllc"], stages=stages)),
    ]
    for metric in attention.METRICS:
        draw = partial(_attention_metric, metric=metric, stages=stages)
        recipes.append(Recipe(f"attn-{metric.replace('_', '-')}", ("attention",), draw))
    return recipes


FAMILY_RECIPES = (
    Recipe(
        "loss-and-llc-multiple", ("evals", "llc"), lambda t: development.loss_and_llc_of_seeds(t["evals"], t["llc"])
    ),
    Recipe(
        "loss-and-llc-calibrated-multiple",
        ("evals", "llc_calibrated"),
        lambda t: development.loss_and_llc_of_seeds(t["evals"], t["llc_calibrated"]),
    ),
    Recipe("llc-against-loss", ("llc", "evals"), lambda t: development.llc_against_loss(t["llc"], ridge_loss(t))),
    Recipe("llc-climb", ("llc_traces", "llc"), lambda t: chains.climbs(t["llc_traces"], t["llc"])),
    Recipe("task-prior", ("task_prior",), lambda t: task_families.task_prior(t["task_prior"])),
    Recipe(
        "transient-losses",
        ("transient_distances",),
        lambda t: task_families.transient_losses(t["transient_distances"], critical_steps(t["transient_distances"])),
    ),
    Recipe(
        "transient-distances",
        ("transient_distances",),
        lambda t: task_families.transient_distances(t["transient_distances"], critical_steps(t["transient_distances"])),
    ),
    Recipe(
        "transient-trajectories",
        ("transient_scores", "transient_references", "transient_distances"),
        lambda t: task_families.transient_trajectories(
            t["transient_scores"], t["transient_references"], critical_steps(t["transient_distances"])
        ),
    ),
    Recipe("transient-llc", ("transient_llc",), lambda t: task_families.transient_llc(t["transient_llc"])),
)
"""The figures of several runs together."""


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
    drawable = {name for recipe in (*FAMILY_RECIPES, *run_recipes()) for name in recipe.needs}
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


@dataclass(frozen=True)
class _Task:
    """One figure to draw: its name, the tables it needs, and the folder for its files."""

    name: str
    tables: Tables
    folder: Path


def _tasks(family: Path, output: Path) -> Iterator[_Task]:
    tables = read_tables(family)
    yield from _tasks_of(FAMILY_RECIPES, tables, output / family.name)
    for seed in seeds_of(tables):
        yield from _tasks_of(run_recipes(), tables_of_seed(tables, seed), output / f"{family.name}-seed-{seed}")


def _tasks_of(recipes: Sequence[Recipe], tables: Tables, folder: Path) -> Iterator[_Task]:
    for recipe in recipes:
        yield _Task(recipe.name, {name: tables[name] for name in recipe.needs if name in tables}, folder)


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
    figure = _attempt(_recipe(task.name), task.tables, task.folder.name, lines.append)
    if figure is None:
        return lines, []
    return [*lines, f"drew {task.folder.name}/{task.name}"], save(figure, task.folder, task.name)


def draw(name: str, tables: Tables, report: Report = print) -> Figure | None:
    """One figure by its name, for notebooks: of one run if the name is in `run_recipes`, else of the family.

    None, after saying why, if a table is missing.

    Raises:
        ValueError: no figure has this name.
    """
    figure = _attempt(_recipe(name), tables, "notebook", report)
    if figure is not None:
        figure.set_dpi(_NOTEBOOK_DPI)
    return figure


def _recipe(name: str) -> Recipe:
    recipes = {recipe.name: recipe for recipe in (*FAMILY_RECIPES, *run_recipes())}
    if name not in recipes:
        raise ValueError(f"no figure {name!r}; there are: {', '.join(sorted(recipes))}")
    return recipes[name]


def tables_of_seed(tables: Tables, seed: int) -> dict[str, pd.DataFrame]:
    """The rows of one run, of every table that has any, in order of steps where there are steps."""
    chosen = {
        name: rows_where(table, model_seed=seed) for name, table in tables.items() if "model_seed" in table.columns
    }
    return {
        name: in_order(table) if "step" in table.columns else table.reset_index(drop=True)
        for name, table in chosen.items()
        if len(table)
    }


def table_names(family: Path) -> Iterator[str]:
    """The names of the tables in a folder."""
    for path in sorted(family.glob("*.csv*")):
        if path.name.endswith((".csv", ".csv.gz")):
            yield path.name.split(".csv")[0]


def read_tables(family: Path) -> dict[str, pd.DataFrame]:
    """All tables of a family by name."""
    return {name: read_table(family, name) for name in table_names(family)}


def read_table(family: Path, name: str) -> pd.DataFrame:
    """One table of a family.

    Raises:
        ValueError: it is not there; the message has the command that makes it.
    """
    for path in (family / f"{name}.csv", family / f"{name}.csv.gz"):
        if path.is_file():
            return pd.read_csv(path)
    raise ValueError(f"{family / name}.csv is missing; make it with: {command_for(name)}")


def seeds_of(tables: Tables) -> list[int]:
    """The model seeds that any table has."""
    found = {
        int(seed) for table in tables.values() if "model_seed" in table.columns for seed in numbers(table, "model_seed")
    }
    return sorted(found)


def compared_settings(tables: Tables, stages: Stages = PUBLISHED_STAGE_ENDS) -> Figure:
    """λ̂ under the published and under the calibrated settings of one run."""
    settings = {"published": tables["llc"], "calibrated": tables["llc_calibrated"]}
    zero = float(numbers(tables["llc"], "loss/zero")[0]) if "loss/zero" in tables["llc"].columns else None
    return development.settings_compared(settings, tables["evals"], zero, stages)


def ridge_loss(tables: Tables) -> float:
    """The loss of ridge on the sequences of the estimates, for Gaussian tasks: L(w) less the model's mean squared distance to ridge,
    which is the posterior mean, so that E(ŷ - y)² = E(r - y)² + E(ŷ - r)². The median over the runs' last estimates."""
    keys = ["model_seed", "step"]
    both = tables["llc"].merge(tables["evals"][[*keys, "pretrain/delta_ridge"]], on=keys).sort_values("step")
    last = both.groupby("model_seed").tail(1)
    return float((last["loss/init"] - last["pretrain/delta_ridge"]).median())


def fitted_curves(tables: Tables) -> dict[str, pd.DataFrame]:
    """Gaussian-process fits of loss, λ̂ and weight norm of one run, from step 10 on, where log t resolves the grid of steps."""
    curves = {
        "loss": ("evals", "loss/mean", None),
        "llc": ("llc", "llc/mean", "llc/mcse"),
        "norm": ("evals", "weight/norm", None),
    }
    fits = {}
    for name, (table, column, error) in curves.items():
        if table in tables and column in tables[table].columns:
            chosen = tables[table].loc[numbers(tables[table], "step") >= 10].dropna(subset=[column])
            if len(chosen) >= _FEWEST_TO_FIT:
                fits[name] = smooth_curve(chosen["step"], chosen[column], chosen.get(error, 0.0))
    return fits


def smoothed(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A trajectory smoothed with a width that grows along it, as published for 5000 checkpoints, scaled to the number there are."""
    names = [name for name in trajectory.columns if str(name).startswith("pc/")]
    early, late, end = _SMOOTHING * len(trajectory) / NUM_EQUAL_STEPS
    sigmas = sigma_ramp(len(trajectory), max(1.0, early), max(2.0, late), max(1, round(end)))
    values = trajectory[names].to_numpy(dtype=float)
    columns = [variable_gaussian_filter(values[:, i], sigmas) for i in range(values.shape[1])]
    return trajectory.assign(**dict(zip(names, columns, strict=True)))


def forms_of(trajectory: pd.DataFrame, num_components: int = 3) -> pd.DataFrame | None:
    """Forms detected in a trajectory; None for a coarse one, whose cusps are those of its smoothing."""
    if len(trajectory) < _FEWEST_FOR_FORMS:
        return None
    raw = in_order(trajectory)
    scores = _scores(smoothed(raw), num_components)
    scatter = local_scatter(_scores(raw, num_components), scores, round(_SMOOTHING[1] * len(raw) / NUM_EQUAL_STEPS))
    return detect_forms(scores, raw["step"].to_numpy(), num_components, scatter=scatter)


def evolutes_of(trajectory: pd.DataFrame, stages: Stages = PUBLISHED_STAGE_ENDS, num_components: int = 3) -> Figure:
    """The geometry figure of a raw trajectory, as far as published: later the evolute is that of noise about a resting point."""
    forms = forms_of(trajectory, num_components)
    smooth = smoothed(in_order(trajectory))
    circles = geometry_table(_scores(smooth, num_components), smooth["step"].to_numpy(), num_components)
    end = float(smooth["step"].iloc[round(_SHOWN_SHARE * (len(smooth) - 1))])
    if forms is not None:
        forms = _until(forms, end)
    return essential_dynamics.evolutes(_until(trajectory, end), _until(circles, end), forms, stages)


def _until(table: pd.DataFrame, end: float) -> pd.DataFrame:
    return table.loc[numbers(table, "step") <= end]


def functional_trajectory(tables: Tables) -> pd.DataFrame:
    """The trajectory that the paper shows: of all outputs at all tokens."""
    return rows_where(tables["essential_dynamics"], variant="tokens")


def _scores(trajectory: pd.DataFrame, num_components: int) -> np.ndarray:
    names = [f"pc/{i}" for i in range(num_components) if f"pc/{i}" in trajectory.columns]
    return trajectory[names].to_numpy(dtype=float)


def _attention_metric(tables: Tables, metric: str, stages: Stages) -> Figure:
    return attention.attention_metric(tables["attention"], metric, stages)


def _attempt(recipe: Recipe, tables: Tables, family: str, report: Report) -> Figure | None:
    """The figure, or None and one line that says why not."""
    missing = [name for name in recipe.needs if name not in tables]
    if missing:
        report(f"left out {family}/{recipe.name}: no {missing[0]} table; make it with: {command_for(missing[0])}")
        return None
    try:
        return recipe.draw(tables)
    except ValueError as error:
        # A table that is too short for one figure must not cost the others.
        report(f"left out {family}/{recipe.name}: {error}")
    except KeyError as error:
        report(f"left out {family}/{recipe.name}: the table has no column {error}")
    return None
