"""Figures of the calibration grids show every cell, and mark those that failed."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from icl.figures import build, calibration_grids
from icl.figures.calibration_grids import GRADIENT, LOCALISATION, NOISE
from icl.figures.families import GRIDS
from icl.figures.recipes import GRID_RECIPES

DRAWS = (10, 20, 30)
SETTINGS = {
    "eps_temp_gamma": {GRADIENT: (0.0001, 0.01), LOCALISATION: (0.001, 10.0), NOISE: (0.0003, 0.01)},
    "eval_dataset_size": {"sampler_config.eval_dataset_size": (1024, 8192, 65536)},
    "eval_fixed_batch": {"sampler_config.eval_batch_size": (1024, 4096)},
    "eval_minibatch": {
        "sampler_config.eval_method": ("grad-minibatch", "new-minibatch"),
        "sampler_config.grad_batch_size": (256, 1024, 4096),
    },
    "eval_loss_fn": {"sampler_config.eval_loss_fn": ("mse", "subsequence-mse")},
}


def grid_and_traces(name: str, seeds: tuple[int, ...] = (0,), steps: tuple[int, ...] = (984, 499_999)):
    """A table of estimates and its traces. Chains of localisation scale 10 diverge after the second draw."""
    settings = SETTINGS.get(name, {})
    rows, traces = [], []
    for seed, *values, step in product(seeds, *settings.values(), steps):
        run = {"model_seed": seed, **dict(zip(settings, values, strict=True)), "step": step}
        lost = run.get(LOCALISATION) == 10
        for chain, slope in enumerate((0.01, 0.03)):
            losses = [1e3, 1e25, np.nan] if lost else [2.0 + slope * draw for draw in DRAWS]
            traces += [
                {**run, "chain": chain, "draw": draw, "loss": loss, "distance": 1.0}
                for draw, loss in zip(DRAWS, losses, strict=True)
            ]
        excess = np.nan if lost else 0.4
        found = {
            "llc/mean": 50 * excess,
            "llc/mcse": 1.0,
            "loss/init": 2.0,
            "loss/mean": 2.0 + excess,
            "loss/excess": excess,
        }
        tokens = {f"llc/mean/{k}": 50 * excess + k for k in range(3)}
        verdict = "2 of 2 chains diverged" if lost else "healthy"
        rows.append({**run, **found, **tokens, "loss/zero": 4.0, "chains/lost": 2 * lost, "verdict": verdict})
    return pd.DataFrame(rows), pd.DataFrame(traces)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    made = {}
    for name in GRIDS:
        seeds = (0, 1) if name.startswith("non") else (0,)
        steps = (0,) if name == "non_minima" else (984, 499_999)
        made[name], made[f"{name}_traces"] = grid_and_traces(name, seeds, steps)
    return made


def test_every_grid_has_its_figure(tables, tmp_path, monkeypatch):
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(build, "save", lambda figure, folder, name: drawn.setdefault(name, figure) and [])
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    lines: list[str] = []
    build.build_figures(tmp_path, tmp_path / "figures", lines.append)
    assert set(drawn) == {recipe.name for recipe in GRID_RECIPES}
    assert not [line for line in lines if line.startswith("left out")]  # nothing else can be drawn from such tables


def test_the_grid_of_scales_shows_chains_that_diverge_at_the_edge_of_their_panel(tables):
    figure = calibration_grids.scales(tables["eps_temp_gamma"], tables["eps_temp_gamma_traces"])
    assert len(figure.axes) == 4
    for axis in figure.axes:
        stays, leaves, *others = [line for line in axis.get_lines() if line.get_linestyle() == "-"]
        assert not others
        np.testing.assert_allclose(stays.get_ydata(), [2.2, 2.3, 2.4])  # the mean over chains of the draws so far
        assert np.nanmax(leaves.get_ydata()) > axis.get_ylim()[1]
        (edge,) = [line for line in axis.get_lines() if line.get_marker() == "^"]
        assert list(edge.get_xdata()) == [20]  # the last draw with a finite loss
        assert list(edge.get_ydata()) == [axis.get_ylim()[1]]
        assert edge.get_color() == leaves.get_color()


def test_the_size_of_the_data_set_is_an_axis(tables):
    (axis,) = calibration_grids.dataset_sizes(tables["eval_dataset_size"]).axes
    lines = [line for line in axis.get_lines() if line.get_linestyle() == "-"]
    assert [line.get_label() for line in lines] == ["step 984", "step 499,999"]
    assert all(list(line.get_xdata()) == [1024, 8192, 65536] for line in lines)


def test_panels_are_settings_and_lines_are_checkpoints(tables):
    for draw, name, panels in (
        (calibration_grids.batch_sizes, "eval_minibatch", 6),
        (calibration_grids.fixed_batches, "eval_fixed_batch", 2),
        (calibration_grids.loss_functions, "eval_loss_fn", 2),
    ):
        figure = draw(tables[name], tables[f"{name}_traces"])
        assert len(figure.axes) == panels
        for axis in figure.axes:
            lines = [line for line in axis.get_lines() if line.get_linestyle() == "-"]
            assert [line.get_label() for line in lines] == ["step 984", "step 499,999"]
            for line in lines:
                np.testing.assert_allclose(line.get_ydata(), [10, 15, 20])


def test_the_three_failures_have_one_column_each_and_one_colour_per_seed(tables):
    names = ("eps_temp_gamma", "non_minima", "non_exploration")
    figure = calibration_grids.failures(*(tables[f"{name}{kind}"] for name in names for kind in ("", "_traces")))
    chains, curves = figure.axes[1].get_lines(), figure.axes[4].get_lines()
    assert len(chains) == 4
    assert len({line.get_color() for line in chains}) == 2
    assert [line.get_label() for line in curves if line.get_linestyle() != "None"] == ["seed 0", "seed 1"]
    whole = tables["eps_temp_gamma"]
    healthy = whole[whole["chains/lost"] == 0]
    with pytest.raises(ValueError, match="no chain of the grid of scales has diverged"):
        calibration_grids.failures(healthy, *(tables["eps_temp_gamma_traces"],) * 5)
