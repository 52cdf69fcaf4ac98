"""All figures from tables on disk: which are drawn, which are left out and why, and that equal tables give equal files."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from icl.figures import build
from icl.figures.build import build_figures, draw
from icl.figures.families import read_table, read_tables, tables_of_seed
from icl.figures.recipes import FAMILY_RECIPES, RUN_RECIPES

pytestmark = pytest.mark.xdist_group("figures")  # the tables that they are drawn from are made once


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Figure]:
    """Figures in place of files: everything is drawn, nothing is encoded."""
    figures: dict[str, Figure] = {}

    def keep(figure: Figure, folder: Path, name: str) -> list[Path]:
        figure.set_layout_engine(None)  # most of the time, and the same for every table
        figure.draw_without_rendering()
        figures[f"{folder.name}/{name}"] = figure
        return [folder / f"{name}.png"]

    monkeypatch.setattr(build, "save", keep)
    return figures


def test_every_figure_of_a_run_is_drawn_from_its_tables(family, drawn, tmp_path, monkeypatch):
    lines: list[str] = []
    # Both seeds are in the figures of the family; one is enough for those of a run.
    monkeypatch.setattr(build, "seeds_of", lambda tables: [3])
    written = build_figures(family.parent, tmp_path, lines.append)
    expected = {f"tiny-seed-3/{recipe.name}" for recipe in RUN_RECIPES}
    left_out = {line.split(":")[0].removeprefix("left out ") for line in lines if line.startswith("left out")}
    # A random model has no head with a role, and one number of tasks is no family of them.
    allowed = {
        "attn-roles",
        *(recipe.name for recipe in FAMILY_RECIPES if recipe.name.startswith(("transient", "task-prior"))),
    }
    assert {name.split("/")[1] for name in left_out} <= allowed
    assert set(drawn) >= expected - left_out
    assert len(written) == len(drawn)


def test_a_missing_table_costs_its_figures_only_and_names_the_command(family, drawn, tmp_path):
    alone = tmp_path / "data" / "lone"
    alone.mkdir(parents=True)
    (alone / "spectra.csv").write_bytes((family / "spectra.csv").read_bytes())
    lines: list[str] = []
    build_figures(alone.parent, tmp_path, lines.append)
    assert set(drawn) == {"lone-seed-3/embed-collapse", "lone-seed-5/embed-collapse"}
    (line,) = [line for line in lines if line.startswith("left out lone-seed-3/hessian")]
    assert "icl analyse RUN --only hessian" in line


def test_equal_tables_give_equal_files_in_one_process_or_two(family, tmp_path):
    alone = tmp_path / "data" / "lone"
    alone.mkdir(parents=True)
    (alone / "spectra.csv").write_bytes((family / "spectra.csv").read_bytes())
    lines: dict[str, list[str]] = {"one": [], "two": []}
    first, second = (
        build_figures(alone.parent, tmp_path / name, lines[name].append, jobs)
        for jobs, name in enumerate(("one", "two"), start=1)
    )
    assert lines["one"] == lines["two"]
    assert {path.suffix for path in first} == {".png", ".pdf"}
    assert [path.relative_to(tmp_path / "one") for path in first] == [
        path.relative_to(tmp_path / "two") for path in second
    ]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_a_folder_without_tables_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no tables"):
        build_figures(tmp_path, tmp_path)


def test_a_table_that_is_not_there_names_its_command(tmp_path):
    with pytest.raises(ValueError, match="make it with: icl analyse RUN --only spectra"):
        read_table(tmp_path, "spectra")


def test_notebooks_draw_by_name(family):
    tables = tables_of_seed(read_tables(family), 3)
    assert isinstance(draw("icl-scores", tables), Figure)
    lines: list[str] = []
    assert draw("hessian", {}, lines.append) is None
    assert "no hessian table" in lines[0]
    with pytest.raises(ValueError, match="no figure 'icl-score'"):
        draw("icl-score", tables)
