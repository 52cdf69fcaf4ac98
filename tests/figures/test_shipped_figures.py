"""The figures of the repository are those of its data: every one is drawn, and drawn again it has the same pixels."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from icl.figures.build import build_figures
from icl.figures.families import read_tables, run_label, runs_of, tables_of_run, tables_of_seed
from icl.figures.recipes import FAMILY_RECIPES, GRID_RECIPES, RUN_RECIPES

ROOT = Path(__file__).parents[2]
SEEDS = [ROOT / "data" / name for name in ("L2H4Minf", "L2H4Minf-K16")]
TASKS = [ROOT / "data" / name for name in ("L2H4Mfin-K8", "L2H4Mfin", "transient-ridge")]
GRIDS = ROOT / "data" / "calibration"


def names(folder: Path) -> set[str]:
    made = (
        path
        for kind in ("L2H4Minf*", "L2H4Mfin*", "transient-ridge", "calibration")
        for path in folder.glob(f"{kind}/*")
    )
    return {f"{path.parent.name}/{path.name}" for path in made if path.suffix in (".png", ".pdf")}


def test_every_figure_of_the_repository_is_one_that_the_data_gives():
    sources = {"calibration": (GRID_RECIPES, read_tables(GRIDS))}
    for family in SEEDS:
        tables = read_tables(family)
        seeds = set().union(*(set(table["model_seed"]) for table in tables.values() if "model_seed" in table.columns))
        sources |= {family.name: (FAMILY_RECIPES, tables)} | {
            f"{family.name}-seed-{seed}": (RUN_RECIPES, tables_of_seed(tables, seed)) for seed in map(int, seeds)
        }
    for family in TASKS:
        tables = read_tables(family)
        runs = runs_of(tables)
        sources |= {family.name: (FAMILY_RECIPES, tables)} | {
            f"{family.name}-{run_label(run, among=runs)}": (RUN_RECIPES, tables_of_run(tables, run)) for run in runs
        }
    possible = {
        f"{folder}/{recipe.name}.{kind}"
        for folder, (recipes, there) in sources.items()
        for recipe in recipes
        if set(recipe.needs) <= set(there)
        for kind in ("png", "pdf")
    }
    assert names(ROOT / "figures") <= possible
    # A family of one run has no figure of its numbers of tasks; a head may have no role.
    assert {name.split("/")[1].split(".")[0] for name in possible - names(ROOT / "figures")} <= {
        "task-prior",
        "attn-roles",
    }


@pytest.mark.slow
def test_two_rebuilds_give_the_same_pixels_and_the_files_of_the_repository(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        build_figures(ROOT / "data", folder, jobs=2, stages="paper")
    assert names(first) == names(second) == names(ROOT / "figures")
    for name in sorted(names(first)):
        if name.endswith(".png"):
            assert (imread(first / name) == imread(second / name)).all(), name
        else:
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
