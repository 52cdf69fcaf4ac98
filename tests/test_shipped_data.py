"""What data/ ships: every column is described, every table has every checkpoint, and the checkpoints give the tables again."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from icl.analysis.data import AnalysisData, DataSettings
from icl.analysis.measures import MEASURES
from icl.analysis.run import ESSENTIAL_DYNAMICS, load_model, table_path
from icl.analysis.run_tables import keys_of, label_of
from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig, expand_steps
from icl.config.sweeps import expand, load_sweep
from icl.estimation import LLCConfig
from icl.estimation.tables import write_stages
from icl.figures.families import read_table, table_names
from icl.storage import LocalStore

ROOT = Path(__file__).parent.parent
FAMILY = ROOT / "data" / "L2H4Minf"
OTHERS = [ROOT / "data" / name for name in ("L2H4Mfin-K8", "L2H4Mfin", "L2H4Minf-K16", "transient-ridge")]
TABLES = sorted(table_names(FAMILY))
SWEEPS = {
    "llc": "4-L2H4-shipped-llcs",
    "llc_calibrated": "L2H4-llcs-calibrated",
    "llc_calibrated_dense": "15-L2H4-dense-llcs-calibrated",
    "llc_long": "7-L2H4-long-llcs",
    "llc_relative": "8-L2H4-relative-llcs",
    "llc_table_gamma": "14-L2H4-table-gamma-llcs",
    "gamma_spectrum": "9-L2H4-gamma-spectrum",
    "restricted": "10-L2H4-restricted-llcs",
    "restricted_calibrated": "10-L2H4-restricted-llcs-calibrated",
    "restricted_relative": "10-L2H4-restricted-llcs-relative",
    "complement_calibrated": "10-L2H4-complement-llcs-calibrated",
}
ESTIMATES = {f"{table}{kind}" for table in SWEEPS for kind in ("", "_traces")}
DERIVED = {"stages", "boundaries"}
OF_SOME_STEPS = {"curvature", "rescaled"}
"""Measured at few checkpoints (`benchmarks.geometry`)."""
OF_ALL_STEPS = ["llc_calibrated_dense"]
"""Estimated at every checkpoint that training writes; most of them are not shipped."""
MISSING = {
    "llc": r"test/|gamma",  # whose chains ran before the target was tested
    "llc_long": r"test/|gamma",
    "llc_calibrated": r"batch|gamma$",  # whose sweep does not ask for the loss on batches
    "llc_calibrated_dense": r"batch",
    "llc_relative": r"batch",
    **dict.fromkeys(("llc_table_gamma", "restricted"), "test/minimum"),  # which needs more than two chains
}
"""The columns of `llc` that a table like it does not have."""
LATE = ("5-L2H4-late-llcs", "6-L2H4-stage-end-llcs")
"""The sweeps of the published estimator with more chains, at late checkpoints."""
RUNS = {
    json.loads(path.read_text())["task_config"]["model_seed"]: path.parent.name
    for path in (FAMILY / "checkpoints" / "icl").glob("*/config.json")
}


@pytest.fixture(scope="module")
def checkpoints() -> Checkpoints:
    """Of model seed 1, at every step that is measured."""
    return Checkpoints(LocalStore(FAMILY / "checkpoints"), RUNS[1])


@pytest.fixture(scope="module")
def config(checkpoints) -> TrainingConfig:
    return TrainingConfig.parse(checkpoints.config()).resolved()


def sweep_of(table: str) -> LLCConfig:
    """The settings of the sweep file that a table of estimates, or of traces, comes from."""
    return configs_of(SWEEPS[table.removesuffix("_traces")])[0]


def configs_of(sweep: str) -> list[LLCConfig]:
    file = ROOT / "sweeps" / "analysis" / f"{sweep}.yaml"
    return [LLCConfig.parse(data) for data in expand(load_sweep(file))]


def runs_in(rows: pd.DataFrame) -> dict[str, str]:
    """Label -> name of the runs whose rows a table has, as its settings put it."""
    keys = [key for key in keys_of(rows) if key == "model_seed" or key.startswith("sampler_config")]
    runs = rows[keys].drop_duplicates().to_dict("records")
    return {label_of(run): RUNS[run["model_seed"]] for run in runs}


def described(table: str) -> list[re.Pattern[str]]:
    """The columns that data/README.md describes for a table, `{k}` standing for a number."""
    text = (ROOT / "data" / "README.md").read_text()
    section = text.split(f"\n## {table}\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [re.compile(re.sub(r"\\\{\w\\\}", r"\\d+", re.escape(name))) for name in names]


@pytest.mark.parametrize("table", TABLES)
def test_the_dictionary_describes_exactly_the_columns_there_are(table):
    columns = set(read_table(FAMILY, table).columns) - {"model_seed", "step" if table != "boundaries" else ""}
    patterns = described(
        re.sub(r"(llc|restricted)_(calibrated_dense|calibrated|long|relative|table_gamma)", r"\1", table)
    )
    if table in MISSING:
        patterns = [pattern for pattern in patterns if not re.match(MISSING[table], pattern.pattern)]
    undescribed = {column for column in columns if not any(pattern.fullmatch(column) for pattern in patterns)}
    stale = {pattern.pattern for pattern in patterns if not any(pattern.fullmatch(column) for column in columns)}
    assert (undescribed, stale) == (set(), set())


@pytest.mark.parametrize(
    ("folder", "table"), [(folder, table) for folder in OTHERS for table in sorted(table_names(folder))]
)
def test_every_column_of_the_other_models_is_described(folder, table):
    like = {"complement": "complement_calibrated"}.get(table, re.sub(r"llc_(calibrated|relative)", "llc", table))
    patterns = [*described(like), *(described("llc") if table in ("restricted", "complement") else [])]
    columns = set(read_table(folder, table).columns) - {"model_seed", "num_tasks", "task_config.num_tasks", "step"}
    assert {column for column in columns if not any(pattern.fullmatch(column) for pattern in patterns)} == set()


@pytest.mark.parametrize("table", sorted(set(TABLES) - ESTIMATES - DERIVED - OF_SOME_STEPS - {ESSENTIAL_DYNAMICS}))
def test_a_table_has_every_checkpoint_and_says_what_made_it(table, checkpoints, config):
    rows = read_table(FAMILY, table)
    for _, mine in rows.groupby("model_seed"):
        assert sorted(set(mine["step"])) == checkpoints.steps()
    assert not rows.isna().all(axis=1).any()
    made = json.loads((FAMILY / f"{table}.json").read_text())
    assert made["runs"] == runs_in(rows)
    assert made["num_steps"] == config.num_steps
    assert made["task_config"]["noise_variance"] == config.task_config.noise_variance


def test_essential_dynamics_has_the_published_grid_and_shares_of_its_variance(config):
    rows = read_table(FAMILY, ESSENTIAL_DYNAMICS)
    assert set(rows["model_seed"]) == {1}
    for _, mine in rows.groupby("variant"):
        assert mine["step"].tolist() == expand_steps({"linear_space": 5000}, config.num_steps)
        scores, shares = mine.filter(like="pc/").to_numpy(), mine.filter(like="explained").to_numpy()
        assert np.ptp(shares, axis=0).max() == 0
        np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-3 * scores.std())
        np.testing.assert_allclose(scores.var(axis=0) / scores[:, 0].var(), shares[0] / shares[0, 0], rtol=1e-3)


@pytest.mark.parametrize("table", sorted(ESTIMATES & set(TABLES)))
def test_estimates_are_of_shipped_checkpoints_and_their_settings_are_those_of_the_sweep(table, checkpoints, config):
    rows = read_table(FAMILY, table)
    if table not in OF_ALL_STEPS:
        assert set(rows["step"]) <= set(checkpoints.steps())
    made = json.loads((FAMILY / f"{table}.json").read_text())
    assert made["runs"] == runs_in(rows)
    chosen = sweep_of(table)
    assert set(rows["step"]) <= set(expand_steps(chosen.steps, config.num_steps))
    varied = {key.removeprefix("sampler_config.") for key in keys_of(rows)}
    kept = {"num_chains", "cores", "max_memory_bytes"} | varied  # not what an estimate is of, or a column
    expected = chosen.sampler_config.decisive()
    assert made["sampler_config"] == {name: value for name, value in expected.items() if name not in kept}


@pytest.mark.parametrize("table", OF_ALL_STEPS)
def test_a_dense_curve_has_every_checkpoint_that_training_writes_and_goes_through_the_thinned_one(table, config):
    dense, thinned = read_table(FAMILY, table), read_table(FAMILY, table.removesuffix("_dense"))
    written = expand_steps(config.checkpointer_config.checkpoint_steps, config.num_steps)
    assert dense["step"].tolist() == [step for step in written if step < config.num_steps]
    both = dense.merge(thinned[thinned["model_seed"] == 1], on=["model_seed", "step"])
    assert sorted(both["step"]) == sorted(thinned.loc[thinned["model_seed"] == 1, "step"])
    np.testing.assert_allclose(both["llc/mean_x"], both["llc/mean_y"], rtol=1e-4)


def test_the_late_sweeps_differ_in_their_chains_alone_and_their_estimates_are_the_ones_that_are_kept():
    late, usual = [config for sweep in LATE for config in configs_of(sweep)], sweep_of("llc").sampler_config
    many = late[0].sampler_config
    assert many == usual.model_copy(update={"num_chains": many.num_chains})
    assert all(config.sampler_config == many for config in late)
    llc = read_table(FAMILY, "llc")
    kept = llc.loc[llc["chains"] == many.num_chains, ["model_seed", "step"]]
    asked = [(config.training.task_config.model_seed, step) for config in late for step in config.steps]
    assert sorted(kept.itertuples(index=False, name=None)) == sorted(asked)
    assert set(llc["chains"]) == {many.num_chains, usual.num_chains}


@pytest.mark.parametrize("table", sorted(SWEEPS))
def test_an_estimate_is_the_excess_loss_of_its_chains(table):
    llc = read_table(FAMILY, table)
    nbeta = sweep_of(table).sampler_config.inverse_temperature
    # Both differences of losses are rounded to seven digits of numbers near 4.
    np.testing.assert_allclose(llc["llc/mean"], nbeta * llc["loss/excess"], rtol=1e-4, atol=1e-3)
    tokens = llc.filter(regex=r"llc/mean/\d").mean(axis=1)
    np.testing.assert_allclose(tokens, llc["llc/mean"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("table", sorted(table for table in SWEEPS if f"{table}_traces" in TABLES))
def test_traces_are_of_the_chains_of_an_estimate(table):
    llc, traces = read_table(FAMILY, table), read_table(FAMILY, f"{table}_traces")
    keys = [*keys_of(llc), "step"]
    means = traces.groupby(keys)["loss"].mean().loc[list(llc[keys].itertuples(index=False, name=None))]
    np.testing.assert_allclose(means, llc["loss/mean"], rtol=1e-3)
    chains = traces.groupby(keys)["chain"].nunique().loc[means.index]
    assert chains.tolist() == llc["chains"].tolist()


def test_stages_and_boundaries_are_those_of_the_shipped_estimates(tmp_path):
    for name in ("evals", "llc", "llc_calibrated"):
        shutil.copy(FAMILY / f"{name}.csv", tmp_path)
    write_stages(tmp_path)
    for name in DERIVED:
        again, shipped = pd.read_csv(tmp_path / f"{name}.csv"), read_table(FAMILY, name)
        # Rounding makes another machine draw other curves of the same law: 1000 of them give spreads to a few percent.
        pd.testing.assert_frame_equal(again, shipped, rtol=0.15, atol=0.05)
        means = ["delta_loss", "delta_llc"] if name == "stages" else []
        pd.testing.assert_frame_equal(again[means], shipped[means], rtol=0.02, atol=0.02)


def remeasured(table: str, step: int, checkpoints: Checkpoints, config: TrainingConfig) -> pd.DataFrame:
    settings = DataSettings.model_validate(json.loads((FAMILY / f"{table}.json").read_text())["data"])
    data = AnalysisData(config, settings)
    return MEASURES[table](load_model(checkpoints, config, step), data).reset_index(drop=True)


def assert_same_numbers(table: str, step: int, new: pd.DataFrame) -> None:
    old = read_table(FAMILY, table)
    old = old.loc[(old["step"] == step) & (old["model_seed"] == 1), list(new.columns)].reset_index(drop=True)
    # How many products the iteration took depends on rounding; what it found does not.
    for column in new.columns.drop("hessian/num_products", errors="ignore"):
        if new[column].dtype == object or str(new[column].dtype) == "str":
            assert old[column].tolist() == new[column].tolist()
            continue
        found, expected = new[column].to_numpy(dtype=float), old[column].to_numpy(dtype=float)
        # float32 sums in another order, relative to the column's own size: a tiny entry is a difference of large ones.
        size = float(np.nanmax(np.abs(expected)))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * size, err_msg=f"{table} {column}")


@pytest.mark.parametrize("table", ["spectra", "layer_norm", "task_prior", "effective_task"])
def test_a_shipped_checkpoint_gives_its_rows_again(table, checkpoints, config):
    step = checkpoints.steps()[-1]
    assert_same_numbers(table, step, remeasured(table, step, checkpoints, config))


@pytest.mark.slow
@pytest.mark.parametrize("table", sorted(set(MEASURES) & set(TABLES)))
def test_every_measure_gives_its_rows_again(table, checkpoints, config):
    for step in checkpoints.steps()[::13]:
        with torch.random.fork_rng():
            assert_same_numbers(table, step, remeasured(table, step, checkpoints, config))


def test_tables_lie_where_the_analyses_look_for_them():
    for table in set(MEASURES) & set(TABLES):
        assert table_path(FAMILY, table).is_file()


def test_the_shipped_data_stays_small():
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()) < 60e6
