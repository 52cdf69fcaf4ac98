import json

import numpy as np
import pandas as pd
import pytest
import torch

from icl.analysis.data import AnalysisData, DataSettings
from icl.analysis.essential_dynamics import pca
from icl.analysis.measures import MEASURES
from icl.analysis.run import (
    ANALYSES,
    ESSENTIAL_DYNAMICS,
    TRAJECTORY,
    analyse,
    equal_steps,
    load_model,
    table_path,
)
from icl.analysis.tables import read_table
from icl.checkpoints import Checkpoints
from icl.commands.analyse import analyse_command
from icl.config import ConfigError, TrainingConfig
from icl.model import InContextRegressionTransformer
from icl.storage import LocalStore
from icl.storage.files import write_table

STEPS = (0, 7, 100, 2_000)
SETTINGS = DataSettings(validation_size=23)
QUICK = ("evals", "spectra", "layer_norm", "attention", "task_prior", TRAJECTORY)


def make_run(root, seed=1, name=None, num_tasks="inf", steps=STEPS, num_steps=500_000):
    """A run of a small model whose weights shrink, and its checkpoints."""
    settings = {
        "task_size": 3, "max_examples": 5, "num_tasks": num_tasks, "noise_variance": 0.25, "embed_size": 6, "mlp_size": 7,
        "num_heads": 2, "num_layers": 1, "model_seed": seed, "pretrain_seed": None, "true_seed": None, "sampling_seed": 13,
    }  # fmt: skip
    config = TrainingConfig.parse({"task_config": settings, "eval_batch_size": 17, "num_steps": num_steps}).resolved()
    checkpoints = Checkpoints(LocalStore(root), name or f"run-{seed}")
    checkpoints.save_config(config.model_dump(mode="json"))
    model = InContextRegressionTransformer.from_shape(config.task_config.shape, seed=seed)
    for step in steps:
        checkpoints.save(step, {key: value * (1 + step) ** -0.1 for key, value in model.state_dict().items()})
    return checkpoints, config


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.[cj]s*") if not path.name.startswith(".")}


def test_every_analysis_leaves_a_tidy_table(tmp_path):
    checkpoints, config = make_run(tmp_path, num_tasks=4)
    seen = []
    paths = analyse(checkpoints, tmp_path / "out", settings=SETTINGS, progress=lambda *said: seen.append(said))
    assert list(paths) == list(ANALYSES)
    model = load_model(checkpoints, config, 100)
    data = AnalysisData(config, SETTINGS)
    for name, measure in MEASURES.items():
        table = pd.read_csv(paths[name])
        assert table.columns[:2].tolist() == ["model_seed", "step"]
        assert sorted(set(table["step"])) == list(STEPS)
        direct = measure(model, data)
        ours = table[table["step"] == 100][direct.columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, direct, check_dtype=False, rtol=2e-6)
    total = len(STEPS) * (len(MEASURES) + 4)
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert {all_ for _, _, all_ in seen} == {total}


def test_trajectories_are_the_components_of_their_rows(tmp_path):
    checkpoints, config = make_run(tmp_path)
    table = pd.read_csv(analyse(checkpoints, tmp_path / "out", [TRAJECTORY], settings=SETTINGS)[TRAJECTORY])
    assert sorted(set(table["variant"])) == ["gradient", "predictions", "tokens", "weights"]
    assert all(rows["step"].tolist() == list(STEPS) for _, rows in table.groupby("variant"))
    weights = [
        torch.cat([value.reshape(-1) for value in load_model(checkpoints, config, step).parameters()]).detach().numpy()
        for step in STEPS
    ]
    expected = pca(np.stack(weights), 3)
    ours = table[table["variant"] == "weights"]
    np.testing.assert_allclose(ours["pc/0"], expected.scores[:, 0], rtol=1e-4)
    # The weights shrink along one line.
    np.testing.assert_allclose(ours["explained_variance_ratio/0"], 1, atol=1e-6)


def test_essential_dynamics_is_the_trajectory_over_equal_distances(tmp_path):
    checkpoints, _ = make_run(tmp_path, num_steps=12, steps=range(12))
    asked = [TRAJECTORY, ESSENTIAL_DYNAMICS]
    tables = {name: pd.read_csv(path) for name, path in analyse(checkpoints, tmp_path / "out", asked).items()}
    dense = tables[ESSENTIAL_DYNAMICS]
    assert sorted(set(dense["variant"])) == ["predictions", "tokens"]
    same = tables[TRAJECTORY][tables[TRAJECTORY]["variant"].isin(dense["variant"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(dense, same)
    seen = []
    analyse(checkpoints, tmp_path / "out", asked, progress=lambda *said: seen.append(said))
    assert seen == [(0, "", 0)]


def test_equal_steps_are_the_nearest_checkpoints():
    dense = equal_steps([*range(0, 10_000, 2), *range(100), 9_999], 10_000, num=1_000)
    assert len(dense) == 999
    assert dense[:3] == [0, 10, 20]
    assert np.abs(np.array(dense) - np.linspace(0, 10_000, 1_000)[:-1]).max() <= 2
    assert equal_steps(range(40), 40) == list(range(40))
    for present in (range(0, 5_000, 2), range(0, 10_000, 20), [0], [9, *range(10, 10_000, 10)]):
        with pytest.raises(ConfigError, match=r"999 equally spaced checkpoints.*linear_space=1000"):
            equal_steps(present, 10_000, num=1_000)


def test_interrupted_work_goes_on_to_the_same_bytes(tmp_path):
    checkpoints, _ = make_run(tmp_path)
    analyse(checkpoints, tmp_path / "whole", QUICK, settings=SETTINGS)
    for stop_at in (3, 9, 21, 30):

        def stop(done, note, total, stop_at=stop_at):
            if done == min(stop_at, total - 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            analyse(checkpoints, tmp_path / "parts", QUICK, settings=SETTINGS, progress=stop)
    seen = []
    analyse(checkpoints, tmp_path / "parts", QUICK, settings=SETTINGS, progress=lambda *said: seen.append(said))
    assert 0 < seen[-1][0] < len(STEPS) * (len(QUICK) + 3)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    analyse(checkpoints, tmp_path / "parts", QUICK, settings=SETTINGS, progress=lambda *said: seen.append(said))
    assert seen[-1] == (0, "", 0)
    assert not list((tmp_path / "parts").glob(".trajectory-*"))


def test_new_checkpoints_join_the_tables(tmp_path):
    checkpoints, _ = make_run(tmp_path)
    some = analyse(checkpoints, tmp_path / "out", ["spectra", TRAJECTORY], steps=[0, 100], settings=SETTINGS)
    assert sorted(set(pd.read_csv(some[TRAJECTORY])["step"])) == [0, 100]
    paths = analyse(checkpoints, tmp_path / "out", ["spectra", TRAJECTORY], settings=SETTINGS)
    for path in paths.values():
        assert sorted(set(pd.read_csv(path)["step"])) == list(STEPS)


def test_seeds_share_a_folder_and_other_settings_do_not(tmp_path):
    for seed in (1, 2):
        paths = analyse(make_run(tmp_path, seed)[0], tmp_path / "out", QUICK, settings=SETTINGS)
    for name, path in paths.items():
        assert pd.read_csv(path)["model_seed"].unique().tolist() == [1, 2], name
    described = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert described["runs"] == {"1": "run-1", "2": "run-2"}
    assert described["data"]["validation_size"] == 23
    checkpoints = make_run(tmp_path, 1)[0]
    with pytest.raises(ValueError, match="another output folder"):
        analyse(checkpoints, tmp_path / "out", ["spectra"], settings=DataSettings(validation_size=29))
    with pytest.raises(ValueError, match="from the run run-1"):
        analyse(make_run(tmp_path, 1, "twin")[0], tmp_path / "out", ["spectra"], settings=SETTINGS)


def test_equal_tables_have_equal_bytes(tmp_path):
    table = pd.DataFrame({"model_seed": 1, "step": range(9), "value": 0.5})
    for ending in ("csv", "csv.gz"):
        first, second = tmp_path / f"first.{ending}", tmp_path / f"second.{ending}"
        write_table(table, first)
        write_table(table, second)
        assert first.read_bytes() == second.read_bytes()
        pd.testing.assert_frame_equal(read_table(first), table)


def test_damaged_tables_are_refused(tmp_path):
    checkpoints, _ = make_run(tmp_path)
    path = analyse(checkpoints, tmp_path, ["spectra"], settings=SETTINGS)["spectra"]
    path.write_text("")
    with pytest.raises(ValueError, match="delete it"):
        analyse(checkpoints, tmp_path, ["spectra"], settings=SETTINGS)
    (tmp_path / "spectra.json").unlink()
    with pytest.raises(ValueError, match="move the table away"):
        analyse(checkpoints, tmp_path, ["spectra"], settings=SETTINGS)


def test_refuses_what_cannot_be_analysed(tmp_path):
    checkpoints, config = make_run(tmp_path)
    with pytest.raises(ConfigError, match=r"no analysis 'loss'; known: evals"):
        analyse(checkpoints, tmp_path, ["loss"])
    with pytest.raises(ConfigError, match="no checkpoint at step 8"):
        analyse(checkpoints, tmp_path, ["spectra"], steps=[7, 8])
    with pytest.raises(ConfigError, match=r"no config\.json"):
        analyse(Checkpoints(LocalStore(tmp_path), "nobody"), tmp_path)
    empty = Checkpoints(LocalStore(tmp_path), "empty")
    empty.save_config(config.model_dump(mode="json"))
    with pytest.raises(ConfigError, match="has no checkpoints"):
        analyse(empty, tmp_path)
    with pytest.raises(ConfigError, match="two checkpoints"):
        analyse(checkpoints, tmp_path / "single", [TRAJECTORY], steps=[7])


def test_command_takes_a_name_or_a_folder(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    environment = {"LOCAL_ROOT": str(tmp_path / "store"), "DEVICE": "cpu"}
    named = analyse_command("run-1", ["spectra"], tmp_path / "named", environment)
    folder = analyse_command("store/icl/run-1", ["spectra"], None, {"DEVICE": "cpu"})
    assert folder["spectra"].read_bytes() == named["spectra"].read_bytes()
    assert folder["spectra"].resolve() == table_path(tmp_path / "data" / "run-1", "spectra")
    assert capsys.readouterr().out.splitlines() == [str(named["spectra"]), str(folder["spectra"])]
    with pytest.raises(ConfigError, match=r"holds config\.json"):
        analyse_command("store", ["spectra"], None, environment)
