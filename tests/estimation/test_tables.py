"""From estimates in a results folder to tables: every chain thinned to means of its own draws, nothing lost or doubled."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.config import ConfigError
from icl.estimation import LLCConfig
from icl.estimation.tables import tabulate, write_stages
from icl.estimation.traces import append_trace, read_traces, thinned
from icl.execution.llc_run import run_llc
from icl.execution.surroundings import Surroundings
from icl.model import initial_parameters
from icl.sampling import LLCResult, SamplerConfig, estimate_llc
from icl.storage import LocalStore

TASK = {
    **{"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 2, "num_layers": 1},
    **{"num_tasks": "inf", "model_seed": 7, "noise_variance": 0.25},
}
SAMPLER = {"epsilon": 1e-4, "gamma": 1.0, "nbeta": 10.0, "num_chains": 2, "num_draws": 11, "grad_batch_size": 13}


def config_with(**sampler) -> LLCConfig:
    settings = {**SAMPLER, "init_seed": 5, "per_token": True, **sampler}
    return LLCConfig.parse({"task_config": TASK, "sampler_config": settings, "num_steps": 60})


@pytest.fixture
def place(tmp_path) -> Surroundings:
    config = config_with()
    checkpoints = Checkpoints(LocalStore(tmp_path), config.training.name)
    for step in (0, 59):
        checkpoints.save(step, initial_parameters(config.training.task_config.shape, step))
    return Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")


@pytest.fixture(scope="module")
def result() -> LLCResult:
    xs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return estimate_llc(
        torch.nn.Linear(3, 1),
        lambda predict, batch: predict(batch).square().mean(),
        [xs],
        SamplerConfig(epsilon=1e-3, gamma=1.0, nbeta=5.0, num_chains=3, num_draws=17, init_seed=2),
    )


def test_a_thinned_chain_has_the_mean_of_the_whole_and_ends_where_it_ended(result):
    trace = thinned(result, points=5)
    lengths = np.diff([0, *trace["draw"]])
    assert len(lengths) == 5
    assert max(lengths) - min(lengths) <= 1
    np.testing.assert_allclose(
        np.average(trace["loss"], axis=1, weights=lengths), result.loss_trace.mean(dim=1), rtol=1e-5
    )
    np.testing.assert_allclose(np.array(trace["distance"])[:, -1], result.distances[:, -1], rtol=1e-5)


def test_a_chain_shorter_than_the_points_is_kept_as_it_is(result):
    trace = thinned(result, points=100)
    assert trace["draw"] == list(range(1, 18))
    np.testing.assert_allclose(trace["loss"], result.loss_trace, rtol=1e-5)


def test_a_line_written_twice_counts_once_and_a_torn_one_not_at_all(result, tmp_path):
    for step in (9, 3, 9):
        append_trace(tmp_path, step, result)
    with (tmp_path / "traces.jsonl").open("a") as file:
        file.write('{"step": 12, "dr')
    assert [trace["step"] for trace in read_traces(tmp_path)] == [3, 9]
    assert read_traces(tmp_path / "nowhere") == []


def test_estimates_and_chains_of_a_run_become_tables(place, tmp_path):
    config = config_with()
    assert run_llc(config, place) == 0
    folder = tmp_path / "tables"
    paths = tabulate([config], place.results, folder)
    assert [path.name for path in paths] == ["llc.csv", "llc_traces.csv.gz"]
    estimates, traces = (pd.read_csv(path) for path in paths)
    assert estimates["step"].tolist() == [0, 59]
    assert set(estimates["model_seed"]) == {7}
    np.testing.assert_allclose(estimates["loss/zero"], 2 + 0.25)
    np.testing.assert_allclose(
        estimates[[f"llc/mean/{k}" for k in range(3)]].mean(axis=1), estimates["llc/mean"], rtol=1e-6
    )
    chains = traces.groupby(["step", "chain"])["loss"].mean().groupby("step").mean()
    np.testing.assert_allclose(chains, estimates["loss/mean"], rtol=1e-5)
    settings = json.loads((folder / "llc.json").read_text())
    assert settings["runs"] == {"7": config.training.name}
    assert settings["sampler_config"]["epsilon"] == 1e-4
    before = [path.read_bytes() for path in paths]
    tabulate([config], place.results, folder)
    assert [path.read_bytes() for path in paths] == before


def test_other_settings_do_not_mix_into_a_table(place, tmp_path):
    first, second = config_with(), config_with(gamma=3.0)
    with pytest.raises(ConfigError, match="make them with `icl llc`"):
        tabulate([first], place.results, tmp_path)
    for config in (first, second):
        run_llc(config, place)
    tabulate([first], place.results, tmp_path / "tables")
    with pytest.raises(ValueError, match="was made with sampler_config"):
        tabulate([second], place.results, tmp_path / "tables")


@pytest.mark.parametrize("name", ["metrics", "evals", "stages"])
def test_estimates_do_not_take_the_name_of_another_table(place, tmp_path, name):
    run_llc(config_with(), place)
    with pytest.raises(ConfigError, match=f"--name {name} .* take another, such as llc_{name}"):
        tabulate([config_with()], place.results, tmp_path / "tables", name)
    assert not (tmp_path / "tables").exists()


def test_a_table_of_something_else_is_not_joined_to(place, tmp_path):
    config = config_with()
    assert run_llc(config, place) == 0
    (path, *_) = tabulate([config], place.results, tmp_path / "tables", "spectra")
    pd.read_csv(path).drop(columns="chains").to_csv(path, index=False)
    with pytest.raises(ConfigError, match=r"spectra\.csv is no table of estimates; choose another --name"):
        tabulate([config], place.results, tmp_path / "tables", "spectra")


def test_of_two_estimates_of_a_checkpoint_the_one_with_more_chains_stays(place, tmp_path):
    few, many = config_with(), config_with(num_chains=3)
    late = many.model_copy(update={"steps": (59,)})
    for config in (few, late):
        assert run_llc(config, place) == 0
    orders = {"few-first": (few, late), "many-first": (late, few)}
    tables = {}
    for name, configs in orders.items():
        for config in configs:
            paths = tabulate([config], place.results, tmp_path / name)
        tables[name] = [pd.read_csv(path) for path in paths]
    for estimates, traces in tables.values():
        assert dict(zip(estimates["step"], estimates["chains"], strict=True)) == {0: 2, 59: 3}
        assert traces.groupby("step")["chain"].nunique().to_dict() == {0: 2, 59: 3}
        chains = traces.groupby(["step", "chain"])["loss"].mean().groupby("step").mean()
        np.testing.assert_allclose(chains, estimates["loss/mean"], rtol=1e-5)
    for one, other in zip(*tables.values(), strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_stages_are_read_off_the_tables(tmp_path):
    steps = np.unique(np.geomspace(100, 499_999, 40).astype(int))
    x = np.log(steps)
    keys = {"model_seed": 1, "step": steps}
    evals = pd.DataFrame({**keys, "pretrain/mse": 4.5 - 0.3 * (x - x[0])})
    rise_and_fall = 100 - 8 * (x - np.log(40_000)) ** 2
    llc = pd.DataFrame({**keys, "llc/mean": rise_and_fall, "llc/mcse": 0.5})
    with pytest.raises(ValueError, match=r"evals\.csv is missing"):
        write_stages(tmp_path)
    evals.to_csv(tmp_path / "evals.csv", index=False)
    with pytest.raises(ValueError, match="icl tabulate"):
        write_stages(tmp_path)
    llc[::6].to_csv(tmp_path / "llc.csv", index=False)
    with pytest.raises(ValueError, match="8 estimates or more"):
        write_stages(tmp_path)
    llc.to_csv(tmp_path / "llc.csv", index=False)
    stages, boundaries = (pd.read_csv(path) for path in write_stages(tmp_path))
    assert stages["setting"].unique() == ["llc"]
    assert stages["stage"].tolist() == ["LR1", "LR2", "LR3", "LR4", "LR5"]
    assert stages["type"].tolist() == ["A", "A", "B", "B", "B"]
    at = {end: np.log(end) for end in (1_000, 40_000)}
    expected = 8 * (at[1_000] - at[40_000]) ** 2
    assert stages["delta_llc"][1] == pytest.approx(expected, abs=3)
    assert stages["delta_loss"][1] == pytest.approx(-0.3 * (at[40_000] - at[1_000]), abs=0.03)
    (top,) = boundaries["step"]
    assert np.log(top) == pytest.approx(np.log(40_000), abs=0.1)
    # Two lost estimates, and a third without its error, cost themselves alone.
    llc.loc[[5, 20], "llc/mean"] = np.nan, np.inf
    llc.loc[9, "llc/mcse"] = np.nan
    llc.to_csv(tmp_path / "llc.csv", index=False)
    write_stages(tmp_path)
    (top,) = pd.read_csv(tmp_path / "boundaries.csv")["step"]
    assert np.log(top) == pytest.approx(np.log(40_000), abs=0.1)


def grid(**sampler) -> list[LLCConfig]:
    """Runs over learning rate and seed."""
    runs = [{"lr": lr, "seed": seed} for lr in (0.1, 0.003) for seed in (7, 11)]
    return [
        LLCConfig.parse(
            {
                "task_config": {**TASK, "model_seed": run["seed"]}, "optimizer_config": {"lr": run["lr"]}, "num_steps": 60,
                "sampler_config": {**SAMPLER, "init_seed": 5, **sampler},
            }
        )
        for run in runs
    ]  # fmt: skip


@pytest.fixture
def swept(tmp_path) -> Surroundings:
    place = Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")
    for index, config in enumerate(grid()):
        checkpoints = Checkpoints(place.store, config.training.name)
        tracker = place.open_tracker(config.training.name, config.training, config.training.logger_config, 0)
        for step in (0, 59):
            checkpoints.save(step, initial_parameters(config.training.task_config.shape, step + index))
            tracker.log(step, {"pretrain/mse": index + 1.0 / (step + 1)})
    return place


def test_every_setting_that_varies_is_a_column_whatever_it_is(swept, tmp_path):
    configs = grid()
    for config in configs:
        run_llc(config, swept)
    paths = tabulate(configs, swept.results, tmp_path / "tables")
    tables = {path.name: pd.read_csv(path) for path in paths}
    assert sorted(tables) == ["llc.csv", "llc_traces.csv.gz", "metrics.csv"]
    for table in tables.values():
        assert list(table.columns[:3]) == ["model_seed", "optimizer_config.lr", "step"]
        runs = set(table[["model_seed", "optimizer_config.lr"]].itertuples(index=False, name=None))
        assert runs == {(seed, lr) for seed in (7, 11) for lr in (0.1, 0.003)}
    assert len(tables["llc.csv"]) == len(tables["metrics.csv"]) == 8
    settings = json.loads((tmp_path / "tables" / "llc.json").read_text())
    assert "lr" not in settings["optimizer_config"]
    assert settings["runs"]["model_seed=7, optimizer_config.lr=0.003"] == configs[2].training.name
    before = {path: path.read_bytes() for path in paths}
    tabulate(configs, swept.results, tmp_path / "tables")
    assert {path: path.read_bytes() for path in paths} == before


def test_a_setting_that_begins_to_vary_becomes_a_column_of_the_rows_that_are_there(swept, tmp_path):
    configs = grid()
    for config in configs:
        run_llc(config, swept)
    whole = tabulate(configs, swept.results, tmp_path / "at-once")
    tabulate(configs[:2], swept.results, tmp_path / "in-parts")  # one learning rate
    with pytest.raises(ValueError, match=r"was made with optimizer_config\.lr=0\.1, not 0\.003"):
        tabulate(configs[2:], swept.results, tmp_path / "in-parts")  # nothing here says that it varies
    parts = tabulate(configs, swept.results, tmp_path / "in-parts")
    assert [path.read_bytes() for path in parts] == [path.read_bytes() for path in whole]


def test_estimates_are_found_whatever_the_checkpoints_and_the_sampler_were_and_two_ways_are_named(swept, tmp_path):
    configs = grid()
    for config in grid(gamma=3.0):
        run_llc(config.model_copy(update={"step": 59}), swept)
    (path, *_) = tabulate(configs, swept.results, tmp_path / "tables")
    assert pd.read_csv(path)["step"].tolist() == [59] * 4
    for config in grid(gamma=5.0)[:1]:
        run_llc(config, swept)
    with pytest.raises(
        ConfigError, match=r"under 2 settings of the sampler .*gamma 3.*gamma 5.*choose one with --preset"
    ):
        tabulate(configs, swept.results, tmp_path / "tables")
    with pytest.raises(ConfigError, match="no run of this sweep has estimates under the preset calibrated"):
        tabulate(configs, swept.results, tmp_path / "tables", preset="calibrated")


def test_after_an_error_no_table_is_written(swept, tmp_path):
    configs = grid()
    for config in configs:
        run_llc(config, swept)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "llc_traces.csv.gz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="llc_traces"):
        tabulate(configs, swept.results, tmp_path / "tables")
    assert sorted(path.name for path in (tmp_path / "tables").iterdir() if path.name != ".lock") == [
        "llc_traces.csv.gz"
    ]


def test_estimates_on_other_data_do_not_mix_into_a_table(place, tmp_path):
    plain, refined = config_with(), config_with().model_copy(update={"grad_tasks": "true"})
    for config in (plain, refined):
        assert run_llc(config, place) == 0
    folder = tmp_path / "tables"
    tabulate([plain], place.results, folder)
    about = folder / "llc.json"
    before = json.loads(about.read_text())
    for stored in (
        before,
        {key: before[key] for key in before if not key.endswith("_tasks")},
    ):  # as older versions left it
        about.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match="grad_tasks='pretrain', not 'true'"):
            tabulate([refined], place.results, folder)
    tabulate([plain, refined], place.results, folder)
    assert pd.read_csv(folder / "llc.csv")["grad_tasks"].value_counts().to_dict() == {"pretrain": 2, "true": 2}


def test_the_loss_of_predicting_zero_is_that_of_the_data_of_the_draws(tmp_path):
    data = {"task_config": TASK | {"num_tasks": 3, "pretrain_seed": 1}, "sampler_config": SAMPLER | {"init_seed": 5}}
    config = LLCConfig.parse(data | {"num_steps": 60, "grad_tasks": "true"})
    checkpoints = Checkpoints(LocalStore(tmp_path), config.training.name)
    checkpoints.save(59, initial_parameters(config.training.task_config.shape, 0))
    place = Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")
    assert run_llc(config, place) == 0
    path, _ = tabulate([config], place.results, tmp_path / "tables")
    assert pd.read_csv(path)["loss/zero"].tolist() == [2 + 0.25]
