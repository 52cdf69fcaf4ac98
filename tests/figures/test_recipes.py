"""All figures from tables on disk: which are drawn, which are left out and why, and that equal tables give equal files."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from icl.analysis.stages import PUBLISHED_STAGE_ENDS
from icl.commands.figures import figures_command, left_out
from icl.figures import build
from icl.figures.build import build_figures, draw, stages_of
from icl.figures.families import read_table, read_tables, runs_of, tables_of_seed
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
    monkeypatch.setattr(build, "runs_of", lambda tables: [{"model_seed": 3}])
    written = build_figures(family.parent, tmp_path, lines.append)
    expected = {f"tiny-seed-3/{recipe.name}" for recipe in RUN_RECIPES}
    left_out = {line.split(":")[0].removeprefix("left out ") for line in lines if line.startswith("left out")}
    # A random model has no head with a role, and one number of tasks is no family of them.
    allowed = {
        "attn-roles",
        "loss-multiple",  # of what training logged, which this family has no table of
        *(
            recipe.name
            for recipe in FAMILY_RECIPES
            if recipe.name.startswith(("transient", "task-prior", "memorisation", "llc-over-tasks"))
        ),
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


def test_a_damaged_table_is_told_and_costs_only_its_own_figures(drawn, tmp_path, capfd):
    folder = own_family(tmp_path / "mine", points=10)
    (folder / "llc_traces.csv.gz").write_bytes(gzip.compress(b"model_seed,step\n" * 99)[:20])
    (folder / "llc.json").write_text("[]")
    figures_command(folder, tmp_path / "figures", 1, "paper", verbose=False)
    assert "mine-seed-1-lr-0.01/loss-and-llc" in drawn
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "llc_traces.csv.gz" in line]
    assert line.startswith(
        f"icl: without the table llc_traces: {folder / 'llc_traces.csv.gz'} is not a readable table ("
    )


def test_a_table_that_does_not_tell_the_runs_apart_is_named_with_what_to_do(drawn, family, tmp_path, capfd):
    """As `icl analyse RUN --output` leaves it beside the tables of a sweep."""
    folder = own_family(tmp_path / "mine", points=10)
    evals = pd.read_csv(family / "evals.csv")
    evals.loc[evals["model_seed"] == 3].assign(model_seed=0).to_csv(folder / "evals.csv", index=False)
    figures_command(folder, tmp_path / "figures", 1, "none", verbose=False)
    assert "mine-seed-0-lr-0.01/loss-and-llc" in drawn  # with the losses that training logged
    told = capfd.readouterr().err
    assert (
        "icl: mine: no figure of a single run shows evals. evals has the keys model_seed; llc has model_seed, optimizer_config.lr. Use one "
        "folder for each run" in told
    )
    assert "(evals" not in told  # no command that makes it once more
    (folder / "evals.csv").unlink()
    figures_command(folder, tmp_path / "figures", 1, "none", verbose=False)
    assert "Use one folder" not in capfd.readouterr().err


def test_runs_whose_setting_is_a_number_or_a_text_have_an_order(tmp_path):
    folder = own_family(tmp_path / "mine")
    metrics = pd.read_csv(folder / "metrics.csv").astype({"optimizer_config.lr": object})
    metrics.loc[0, "optimizer_config.lr"] = "fast"
    metrics.to_csv(folder / "metrics.csv", index=False)
    found = {run["optimizer_config.lr"] for run in runs_of(read_tables(folder))}
    assert "fast" in found
    assert {0.003, 0.01} <= {float(rate) for rate in found - {"fast"}}


def test_notebooks_draw_by_name(family):
    tables = tables_of_seed(read_tables(family), 3)
    assert isinstance(draw("icl-scores", tables), Figure)
    lines: list[str] = []
    assert draw("hessian", {}, lines.append) is None
    assert "no hessian table" in lines[0]
    with pytest.raises(ValueError, match="no figure 'icl-score'"):
        draw("icl-score", tables)


def own_family(folder: Path, points: int = 5) -> Path:
    """Tables as `icl tabulate` makes them: two learning rates, two seeds, a run of 500 steps."""
    rows = [
        {
            "model_seed": seed, "optimizer_config.lr": lr, "step": int(step), "llc/mean": 10 * lr * step + seed, "llc/mcse": 0.1,
            "loss/init": 4 - step / 500, "verdict": "healthy",
        }
        for seed in (0, 1) for lr in (0.003, 0.01) for step in np.linspace(3, 499, points).astype(int)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    table = pd.DataFrame(rows)
    table.to_csv(folder / "llc.csv", index=False)
    metrics = table.drop(columns=["llc/mean", "llc/mcse", "verdict"]).rename(columns={"loss/init": "pretrain/mse"})
    metrics.to_csv(folder / "metrics.csv", index=False)
    return folder


def test_a_family_of_ones_own_has_its_own_steps_a_line_per_setting_and_no_stage_of_another_model(drawn, tmp_path):
    folder = own_family(tmp_path / "anywhere" / "mine")
    for data, stages in ((folder, "found"), (folder.parent, "none"), (folder, "paper")):
        drawn.clear()
        lines: list[str] = []
        build_figures(data, tmp_path / "figures", lines.append, stages=stages)
        assert ("mine is not the paper's model" in " ".join(lines)) == (stages == "paper")
        assert {f"mine-seed-{s}-lr-{lr}/loss-and-llc" for s in (0, 1) for lr in (0.003, 0.01)} <= set(drawn)
        for name in ("mine/loss-and-llc-multiple", "mine/loss-multiple", "mine-seed-1-lr-0.01/loss-and-llc"):
            figure = drawn[name]
            texts = [text.get_text() for axis in figure.axes for text in axis.texts]
            texts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
            assert not any(text.startswith(("LR", "S1")) for text in texts)
            for axis in figure.axes:
                left, right = axis.get_xlim()
                assert 3 / 1.1 < left < 3
                assert 499 < right < 1.1 * 499
        labels = [
            text.get_text() for legend in drawn["mine/loss-and-llc-multiple"].legends for text in legend.get_texts()
        ]
        assert labels == ["lr 0.003", "lr 0.01"]
        top, bottom = drawn["mine/loss-and-llc-multiple"].axes
        for axis in (top, bottom):
            assert len(axis.collections) == 2  # a band over the seeds of each setting
        (line, _) = bottom.get_lines()[:2]
        np.testing.assert_allclose(line.get_ydata(), 10 * 0.003 * np.asarray(line.get_xdata()) + 0.5)


def test_stages_are_those_that_a_runs_own_estimates_show():
    steps = np.unique(np.geomspace(1, 499, 30).astype(int))
    x = np.log(steps)
    llc = pd.DataFrame({"step": steps, "llc/mean": 100 - 8 * (x - np.log(60)) ** 2, "llc/mcse": 0.5})
    found = stages_of({"llc": llc}, "found")
    assert list(found) == ["S1", "S2"]
    assert 50 < found["S1"] < 72
    assert found["S2"] == 500
    assert found.first == 1
    assert dict(stages_of({"llc": llc}, "none")) == dict(stages_of({"llc": llc[:5]}, "found")) == {}
    assert dict(stages_of({"losses": llc, "llc": llc[:5], "llc_calibrated": llc}, "found")) == dict(found)
    assert dict(stages_of({"llc": llc}, "paper")) == dict(PUBLISHED_STAGE_ENDS)


def test_what_is_left_out_is_told_in_two_lines(family, tmp_path):
    lines: list[str] = []
    build_figures(own_family(tmp_path / "mine"), tmp_path / "figures", lines.append)
    assert len(lines) > 70
    summary = left_out(lines)
    assert len(summary) <= 2
    assert f"left out {sum('table; make it' in line for line in lines)} figures" in summary[0]
