"""A run is its settings, not its name: what another run left under the same name is refused, untouched, in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icl.analysis.run import analyse
from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.format import encode
from icl.checkpoints.runs import copy_run, verify_run
from icl.config import ConfigError, TrainingConfig
from icl.config.sweeps import expand, load_sweep
from icl.estimation import LLCConfig
from icl.estimation.tables import tabulate
from icl.execution.llc_run import run_llc
from icl.execution.names import by_name
from icl.execution.run import is_complete
from icl.execution.surroundings import Surroundings
from icl.execution.sweep import scheduled_runs
from icl.execution.training_runs import run_training, train_in_batches
from icl.storage import LocalStore, MirroredStore

ROOT = Path(__file__).parents[2]
TASK = {
    "task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1, "model_seed": 1, "num_tasks": 7,
}  # fmt: skip
SETTINGS = {
    "task_config": TASK,
    "num_steps": 20,
    "batch_size": 3,
    "eval_batch_size": 3,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 5}, "state_every": 5},
    "logger_config": {"logging_steps": {"linear_space": 3}, "loss_every": 1},
    "run_name": "run",
}
SAMPLER = {"num_chains": 2, "num_draws": 5, "epsilon": 1e-5, "gamma": 1.0, "nbeta": 10.0, "init_seed": 0}

OTHERS = {
    "optimizer_config.lr=0.001, not 0.5": {"optimizer_config": {"lr": 0.5}},
    "optimizer_config.optimizer_type=Adam, not SGD": {"optimizer_config": {"optimizer_type": "SGD"}},
    "scheduler_config.pct_start=0.5, not 0.25": {"scheduler_config": {"pct_start": 0.25}},
    "num_steps=20, not 10": {"num_steps": 10},
    "num_steps=20, not 40": {"num_steps": 40},
    "batch_size=3, not 5": {"batch_size": 5},
    "task_config.num_tasks=7, not inf": {"task_config": {**TASK, "num_tasks": "inf"}},
    "task_config.noise_variance=0.25, not 9.0": {"task_config": {**TASK, "noise_variance": 9}},
    "task_config.mlp_size=5, not 7": {"task_config": {**TASK, "mlp_size": 7}},
    "task_config.model_seed=1, not 2": {"task_config": {**TASK, "model_seed": 2}},
    "task_config.sampling_seed=3, not 4": {"task_config": {**TASK, "sampling_seed": 4}},
    "task_config.layer_norm=True, not False (and 1 more)": {
        "task_config": {**TASK, "residual": "single", "layer_norm": False}
    },
}


def config_of(**changes) -> TrainingConfig:
    return TrainingConfig.parse({**SETTINGS, **changes})


def llc_of(**changes) -> LLCConfig:
    return LLCConfig.parse({**SETTINGS, "step": 19, "sampler_config": SAMPLER, **changes})


def place_of(root: Path, store=None) -> Surroundings:
    return Surroundings(store or LocalStore(root), root / "icl", torch.device("cpu"), tracking="local")


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    assert run_training(config_of(), place_of(root)).finished
    run_llc(llc_of(), place_of(root))
    return root


@pytest.fixture
def root(trained, tmp_path) -> Path:
    """A finished run called "run" and its estimates."""
    shutil.copytree(trained, tmp_path / "root")
    return tmp_path / "root"


def interrupt(root: Path) -> None:
    """The run has more to do: its mark and its last checkpoints are gone."""
    for name in ("finished.json", "15.safetensors", "19.safetensors"):
        (root / "icl/run" / name).unlink()


def refused(call, *words) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("difference", OTHERS)
@pytest.mark.parametrize("stands", ["finished", "interrupted", "without config.json", "with a torn config.json"])
def test_another_run_of_the_name_is_neither_continued_nor_skipped(root, difference, stands):
    other, place, folder = config_of(**OTHERS[difference]), place_of(root), root / "icl/run"
    if stands != "finished":
        interrupt(root)
    if stands == "without config.json":
        (folder / "config.json").unlink()
    if stands == "with a torn config.json":
        (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:100])
    before = contents(root)
    refused(lambda: run_training(other, place), "was made with", difference, "run_name")
    assert not is_complete(other, place)
    refused(lambda: run_llc(llc_of(**OTHERS[difference]), place), difference)
    assert contents(root) == before


def test_a_foreign_state_is_refused_whatever_config_json_says(root):
    other = config_of(optimizer_config={"lr": 0.5})
    (root / "icl/run/config.json").write_text(other.resolved().model_dump_json())
    refused(lambda: run_training(other, place_of(root)), "state-20.safetensors", "optimizer_config.lr=0.001, not 0.5")
    llc = llc_of(optimizer_config={"lr": 0.5})
    refused(lambda: run_llc(llc, place_of(root)), llc.name, "lr=0.001, not 0.5")
    shutil.rmtree(root / "icl" / llc.name)
    refused(lambda: run_llc(llc, place_of(root)), "19.safetensors", "lr=0.001, not 0.5")
    assert not (root / "icl" / llc.name / "config.json").exists()
    named = {problem.key.rpartition("/")[2] for problem in verify_run(LocalStore(root), "run")}
    assert named == {path.name for path in (root / "icl/run").glob("*.safetensors")}
    refused(lambda: analyse(Checkpoints(LocalStore(root), "run"), root / "tables", ["evals"]), "lr=0.001, not 0.5")
    assert not (root / "tables/evals.csv").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"eval_batch_size": 5},
        {"checkpointer_config": {"checkpoint_steps": {"linear_space": 4}, "state_every": 3}},
        {"logger_config": {"logging_steps": {"linear_space": 2}, "loss_every": 7}},
        {"task_config": {**TASK, "task_type": "linear"}},
    ],
)
def test_settings_that_decide_nothing_may_change(root, change):
    assert (
        is_complete(config_of(**change), place_of(root)) or run_training(config_of(**change), place_of(root)).finished
    )


def test_what_was_not_stored_counts_as_its_default(root):
    path = root / "icl/run/config.json"
    stored = json.loads(path.read_text())
    del stored["task_config"]["task_type"], stored["task_config"]["residual"]
    path.write_text(json.dumps(stored))
    assert run_training(config_of(), place_of(root)).finished
    refused(
        lambda: run_training(config_of(task_config={**TASK, "residual": "single"}), place_of(root)),
        "task_config.residual=doubled, not single",
    )


def test_settings_of_a_newer_version_are_refused_with_what_is_wrong(root):
    path = root / "icl/run/config.json"
    stored = json.loads(path.read_text())
    stored["task_config"]["curvature"] = 3
    path.write_text(json.dumps(stored))
    refused(lambda: run_training(config_of(), place_of(root)), "task_config.curvature", "this version of icl")


def test_nothing_is_shown_on_wandb_of_a_run_that_is_another(root, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("a tracker was opened")

    monkeypatch.setattr(Surroundings, "open_tracker", opened)
    place = replace(place_of(root), tracking="wandb")
    refused(lambda: run_training(config_of(optimizer_config={"lr": 0.5}), place), "lr=0.001, not 0.5")


def test_a_null_seed_of_a_named_run_is_drawn_once(tmp_path):
    config, place = config_of(task_config={**TASK, "model_seed": None, "sampling_seed": None}), place_of(tmp_path)
    assert run_training(config, place).finished
    seed = json.loads((tmp_path / "icl/run/config.json").read_text())["task_config"]["model_seed"]
    assert is_complete(config, place)
    interrupt(tmp_path)
    for name in ("config.json", "state-20.safetensors"):
        (tmp_path / "icl/run" / name).unlink()
    assert run_training(config, place).finished
    run = Checkpoints(LocalStore(tmp_path), "run")
    seeds = {json.loads(run.read(step).metadata["config"])["task_config"]["model_seed"] for step in run.steps()}
    assert seeds == {seed}
    llc = llc_of(task_config={**TASK, "model_seed": None, "sampling_seed": None})
    assert run_llc(llc, place) == 0
    assert is_complete(llc, place)
    (path,) = [path for path in tabulate([llc], place.results, tmp_path / "tables") if path.name == "llc.csv"]
    assert f"\n{seed},19," in path.read_text()


def test_runs_of_a_sweep_that_share_a_name_must_be_one_run(tmp_path):
    configs = [config_of(optimizer_config={"lr": lr}) for lr in (0.1, 0.1, 0.01)]
    place = place_of(tmp_path)
    for call in (
        lambda: by_name(configs), lambda: scheduled_runs([[config] for config in configs], place), lambda: train_in_batches(configs, place),
        lambda: by_name([llc_of(optimizer_config={"lr": lr}) for lr in (0.1, 0.01)]),
        lambda: by_name([config_of(task_config={**TASK, "model_seed": None}), *configs]),
    ):  # fmt: skip
        refused(call, "two runs of this sweep are called", "run", "remove run_name")
    assert not list(tmp_path.iterdir())
    assert by_name(configs[:2]) == {"run": 0}
    nameless = [config_of(run_name=None, task_config={**TASK, "model_seed": None})] * 2
    assert list(by_name(nameless).values()) == [0, 1]


def test_estimates_of_other_settings_keep_their_label(root):
    other = llc_of(task_config={**TASK, "noise_variance": 9})
    assert other.name == llc_of().name
    shutil.rmtree(root / "icl/run")
    run_training(other.training, place_of(root))
    before = contents(root)
    refused(lambda: run_llc(other, place_of(root)), llc_of().name, "task_config.noise_variance=0.25, not 9.0")
    refused(lambda: tabulate([other], root / "icl", root / "tables"), llc_of().name, "noise_variance=0.25, not 9.0")
    assert not is_complete(other, place_of(root))
    assert contents(root) == before


def test_a_copy_does_not_mix_two_runs(root, tmp_path):
    other = tmp_path / "other"
    run_training(config_of(optimizer_config={"lr": 0.5}), place_of(other))
    before = contents(other)
    message = refused(
        lambda: copy_run(LocalStore(root), LocalStore(other), "run"), "optimizer_config.lr=0.5, not 0.001"
    )
    assert "move one of the two away" in message
    assert contents(other) == before


def test_a_bucket_with_another_run_of_the_name_stays_as_it_is(root, tmp_path):
    remote = tmp_path / "remote"
    run_training(config_of(optimizer_config={"lr": 0.5}), place_of(remote))
    interrupt(root)
    before = contents(remote)
    store = MirroredStore(LocalStore(root), LocalStore(remote))
    refused(lambda: run_training(config_of(), place_of(root, store)), str(remote), "lr=0.5, not 0.001")
    store.flush(5)
    assert contents(remote) == before


@pytest.mark.parametrize("name", ["../../evil", "a/b", "/tmp/evil", "", "..", ".hidden", "a b", "a\n", "ä", "x" * 188])
def test_a_name_that_is_none_is_refused_when_it_is_read(name):
    for seed in (1, None):
        refused(lambda seed=seed: config_of(run_name=name, task_config={**TASK, "model_seed": seed}), "run_name")


def test_the_longest_name_serves_estimates_too(tmp_path):
    name = "x" * 187
    assert run_training(config_of(run_name=name), place_of(tmp_path)).finished
    assert run_llc(llc_of(run_name=name), place_of(tmp_path)) == 0


@pytest.mark.parametrize("sweep", ["training-runs/L2H4Minf.yaml"])
def test_the_shipped_runs_are_those_of_their_sweep(sweep):
    configs = [TrainingConfig.parse(data) for data in expand(load_sweep(ROOT / "sweeps" / sweep))]
    place = place_of(ROOT / "data/L2H4Minf/checkpoints")
    shipped = {path.name for path in (ROOT / "data/L2H4Minf/checkpoints/icl").iterdir()}
    assert shipped <= {config.name for config in configs}
    for config in configs:
        if config.name in shipped:
            run = place.checkpoints(config)
            run.load(run.steps()[-1])


def test_weights_without_settings_may_be_looked_at_but_a_state_may_not(root):
    run = place_of(root).checkpoints(config_of())
    weights, state = run.read(19), run.newest_state()
    assert state is not None
    run.save(19, weights.tensors)
    assert run.read(19).metadata == {}
    run.store.put(run.state_key(20), encode(20, state.tensors, {}, "state"))
    refused(lambda: run_training(config_of(), place_of(root)), "state-20.safetensors holds no settings")


def leaves(data, path=()):
    if isinstance(data, dict):
        return [leaf for key, value in data.items() for leaf in leaves(value, (*path, key))]
    return [(path, data)]


def put(data, path, value):
    head, *rest = path
    return {**data, head: put(data[head], rest, value) if rest else value}


OTHER_WORDS = (
    "none",
    "Adam",
    "AdamW",
    "SGD",
    "single",
    "double",
    "single-task",
    "new-minibatch",
    "dataset",
    "langevin",
    "sgnht",
    "MSELoss",
)


def others_than(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value * 2 + 1, value / 2, value + 7]
    if isinstance(value, list):
        return [[*value[:-1], other] for other in others_than(value[-1])] if value else []
    return [1, 0.5, 2, 4, True, *OTHER_WORDS, [0.5, 0.9]]


@pytest.mark.parametrize("kind", [TrainingConfig, LLCConfig])
def test_every_setting_of_the_identity_tells_two_runs_apart(kind):
    own = config_of(optimizer_config={"betas": [0.9, 0.99]}).resolved() if kind is TrainingConfig else llc_of()
    stored = own.model_dump(mode="json")
    told, untried = set(), set()
    for path, value in leaves(own.identity()):
        if path not in [known for known, _ in leaves(stored)]:
            continue
        for other in others_than(value):
            try:
                asked = kind.parse(put(stored, path, other))
            except ConfigError:
                continue
            if asked.identity() == own.identity():
                continue  # another way to write the same
            assert asked.difference(stored), path
            with pytest.raises(ConfigError, match="was made with"):
                asked.refuse_another(stored, "the run run")
            told.add(path)
            break
        else:
            untried.add(path)
    assert len(told) > 2 * len(untried), untried  # those that others fix


@pytest.mark.parametrize("content", ["{}", '{"step": 3}', '{"a": {"b": 1}}', "[]", "null", ""])
def test_a_config_that_holds_no_settings_is_damaged_and_is_written_anew(root, content):
    config = config_of()
    before = contents(root)
    (root / "icl/run/config.json").write_text(content)
    refused(lambda: run_training(config_of(optimizer_config={"lr": 0.5}), place_of(root)), "lr=0.001, not 0.5")
    assert run_training(config, place_of(root)).finished
    assert contents(root) == before


@pytest.mark.parametrize(
    "mark", ['{"step": true}', '{"step": -1}', '{"step": 19.0}', '{"step": null}', '{"steps": 19}']
)
def test_a_mark_that_names_no_step_is_none(root, mark):
    (root / "icl/run/finished.json").write_text(mark)
    assert not is_complete(config_of(), place_of(root))
    assert run_training(config_of(), place_of(root)).finished
    assert json.loads((root / "icl/run/finished.json").read_text()) == {"step": 19}
