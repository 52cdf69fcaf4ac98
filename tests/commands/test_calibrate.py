"""`icl calibrate` and the named presets, as a user meets them."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from icl.checkpoints import Checkpoints
from icl.commands.calibrate import Budget, _Journal, calibrate_command, say_cost
from icl.config import ConfigError
from icl.config.sweeps import expand, load_sweep
from icl.estimation import LLCConfig
from icl.model import initial_parameters
from icl.sampling import PRESETS, PUBLISHED
from icl.sampling.calibration import SearchGrid
from icl.sampling.presets import preset_override
from icl.storage import LocalStore

pytestmark = pytest.mark.xdist_group("calibrate")  # the search that most of these go on with is made once

SWEEP = """\
method: grid
parameters:
  task_config:
    parameters:
      task_size: {value: 2}
      max_examples: {value: 3}
      num_tasks: {value: inf}
      embed_size: {value: 8}
      mlp_size: {value: 5}
      num_heads: {value: 2}
      num_layers: {value: 1}
      model_seed: {value: 7}
  num_steps: {value: 60}
  sampler_config:
    parameters:
      sampling_method: {value: langevin}
      grad_batch_size: {value: 13}
      gradient_scale: {value: 0.001}
      localization_scale: {value: 0.001}
      noise_scale: {value: 0.0001}
      init_seed: {value: 3}
"""
BUDGET = Budget(chains=2, burnin=3, draws=9)
GRID = SearchGrid((1e-5, 1e-4), (10.0,), (5.0, 20.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a sweep file, whose run has checkpoints at 0, 3, 9, 20, 59."""
    folder = tmp_path_factory.mktemp("calibrate")
    (folder / "sweep.yaml").write_text(SWEEP)
    config = LLCConfig.parse(expand(load_sweep(folder / "sweep.yaml"), [])[0])
    checkpoints = Checkpoints(LocalStore(folder / "store"), config.training.name)
    for step in (0, 3, 9, 20, 59):
        checkpoints.save(step, dict(initial_parameters(config.training.task_config.shape, 100 + step)))
    return folder


def set_environment(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("LOCAL_ROOT", str(folder / "store"))
    patch.delenv("AWS_BUCKET_NAME", raising=False)


@pytest.fixture
def sweep(folder, monkeypatch) -> Path:
    set_environment(monkeypatch, folder)
    return folder / "sweep.yaml"


@pytest.fixture(scope="module")
def searched(folder) -> tuple[Path, pd.DataFrame]:
    """The folder and the table of a search that came to its end."""
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, folder)
        found = calibrate_command(folder / "sweep.yaml", 0, [], [59], GRID, BUDGET, folder / "out")
    return folder / "out", found.table


@pytest.fixture
def out(searched, tmp_path, monkeypatch) -> Path:
    """A copy of its folder; figures are not drawn again."""
    monkeypatch.setattr("icl.commands.calibrate._draw", lambda found, output: None)
    return Path(shutil.copytree(searched[0], tmp_path / "out"))


def test_a_search_prints_its_budget_its_table_and_its_finding_and_leaves_table_and_traces(sweep, tmp_path, capsys):
    found = calibrate_command(sweep, 0, [], [3, 59], GRID, BUDGET, tmp_path / "out")
    printed = capsys.readouterr().out
    presets = sum(preset.step_size is not None and preset.estimator == "standard" for preset in PRESETS.values())
    cells = 2 * (4 + presets)
    assert f"{cells} cells" in printed
    assert f"{cells * 2 * 12:,} gradients of 13 sequences" in printed
    assert "published" in printed
    assert found.text in printed
    table = pd.read_csv(tmp_path / "out" / "calibration.csv")
    assert len(table) == cells
    assert {"epsilon", "gamma", "nbeta", "llc", "mcse", "rhat", "ess", "healthy", "insensitive", "verdict"} <= set(
        table
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["traces-3.png", "traces-59.png"]


def test_an_interrupted_search_goes_on_and_another_budget_starts_afresh(sweep, searched, out):
    first = searched[1]
    journal = (out / "cells.jsonl").read_text().splitlines()
    (out / "cells.jsonl").write_text("\n".join(journal[:3]) + '\n{"torn')
    again = calibrate_command(sweep, 0, [], [59], GRID, BUDGET, out)
    pd.testing.assert_frame_equal(again.table, first)
    assert (out / "cells.jsonl").read_text().splitlines() == journal
    other = calibrate_command(sweep, 0, [], [59], GRID, Budget(2, 3, 10), out)
    assert not other.table["llc"].equals(first["llc"])
    both = (out / "cells.jsonl").read_bytes()
    calibrate_command(sweep, 0, [], [59], GRID, BUDGET, out)
    assert (out / "cells.jsonl").read_bytes() == both  # the cells of neither search are lost
    noisier = [
        "task_config.noise_variance=9",
        "run_name=" + LLCConfig.parse(expand(load_sweep(sweep), [])[0]).training.name,
    ]
    another = calibrate_command(sweep, 0, noisier, [59], GRID, BUDGET, out)  # on other data, under the same name
    assert not another.table["llc"].equals(first["llc"])


def test_a_search_on_the_data_of_other_tasks_is_another_search(sweep, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("icl.commands.calibrate._draw", lambda found, output: None)
    few = tmp_path / "few.yaml"
    few.write_text(SWEEP.replace("num_tasks: {value: inf}", "num_tasks: {value: 3}"))
    config = LLCConfig.parse(expand(load_sweep(few), [])[0])
    checkpoints = Checkpoints(LocalStore(folder / "store"), config.training.name)
    checkpoints.save(59, dict(initial_parameters(config.training.task_config.shape, 100)))
    grid, data = SearchGrid((1e-5,), (10.0,), (5.0,)), 'grad_tasks="true"'
    first = calibrate_command(few, 0, [], [59], grid, BUDGET, tmp_path / "out")
    other = calibrate_command(few, 0, [data], [59], grid, BUDGET, tmp_path / "out")
    alone = calibrate_command(few, 0, [data], [59], grid, BUDGET, tmp_path / "alone")
    pd.testing.assert_frame_equal(other.table, alone.table)
    assert not other.table["llc"].equals(first.table["llc"])
    heads = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert ["grad_tasks" in head for head in heads if "sampler" in head] == [False, True]  # old searches stay valid


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (SearchGrid(epsilons=(1e-5, math.nan)), "epsilon: must be a finite number"),
        (SearchGrid(epsilons=(-1.0,)), r"epsilon: .* greater than 0 \(got -1.0\)"),
        (SearchGrid(gammas=(math.inf,)), "gamma: must be a finite number"),
        (SearchGrid(nbetas=(-2.0,)), "nbeta: .* greater than or equal to 0"),
    ],
)
def test_constants_that_no_sampler_takes_are_refused_before_their_cost_is_told(sweep, tmp_path, grid, said):
    with pytest.raises(ConfigError, match=said):
        say_cost(sweep, 0, [], [59], grid, BUDGET)
    with pytest.raises(ConfigError, match=said):
        calibrate_command(sweep, 0, [], [59], grid, BUDGET, tmp_path / "out")


@pytest.mark.parametrize("line", [0, 2])
@pytest.mark.parametrize("spoilt", [b"\0" * 9, b'{"setting": "", "st', b'{"setting": "", "draws": [], "running": []}'])
def test_a_damaged_line_of_a_search_costs_itself_alone(sweep, searched, out, monkeypatch, line, spoilt):
    lines = (out / "cells.jsonl").read_bytes().split(b"\n")
    lines[line] = spoilt
    (out / "cells.jsonl").write_bytes(b"\n".join(lines))
    made = []
    monkeypatch.setattr(_Journal, "append", lambda self, cell: made.append(cell))
    again = calibrate_command(sweep, 0, [], [59], GRID, BUDGET, out)
    assert len(made) == (line > 0)
    pd.testing.assert_frame_equal(again.table, searched[1])
    assert (out / "cells.jsonl.damaged").read_bytes() == spoilt + b"\n"


def test_by_default_four_checkpoints_are_searched_and_unknown_ones_are_refused(sweep, tmp_path):
    grid = SearchGrid((1e-5,), (10.0,), (5.0,))
    found = calibrate_command(sweep, 0, [], [], grid, Budget(1, 0, 4), tmp_path / "out")
    assert sorted(found.table["step"].unique()) == [0, 3, 20, 59]
    with pytest.raises(ConfigError, match="no checkpoint at step 8"):
        calibrate_command(sweep, 0, [], [8], grid, BUDGET, tmp_path / "out")


def test_a_preset_takes_the_place_of_the_files_sampler_and_set_still_wins(sweep):
    overrides = [preset_override("published"), "sampler_config.num_chains=2"]
    sampler = LLCConfig.parse(expand(load_sweep(sweep), overrides)[0]).sampler_config
    assert sampler == PUBLISHED.model_copy(update={"num_chains": 2})
    for name in PRESETS:
        parsed = LLCConfig.parse(expand(load_sweep(sweep), [preset_override(name)])[0])
        assert parsed.sampler_config == PRESETS[name]
    with pytest.raises(ConfigError, match="did you mean 'calibrated'"):
        preset_override("calibrate")
