"""Many seeds as one batch: the data of solo runs bit for bit, their losses to rounding, their files."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.checkpoints.runs import list_runs
from icl.commands.sweep import run_sweep_command
from icl.config import TrainingConfig
from icl.engine import batched_loss_and_grad, loss_and_grad
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import batches_runs
from icl.model import TransformerShape, flatten, initial_parameters
from icl.storage import LocalStore
from icl.streams import Stream
from icl.tasks import EnsembleBatches, RegressionTask
from icl.tracking import LocalTracker, read_metrics
from icl.training import Member, TrainingDiverged, first_missing_step, train, train_members
from icl.training.accelerator import AcceleratorStepper

CPU = torch.device("cpu")
SEEDS = (3, 11, 2)


def make_config(seed: int, num_tasks: int | str = "inf", **changes) -> TrainingConfig:
    task = {
        "task_size": 3, "max_examples": 5, "num_tasks": num_tasks, "noise_variance": 0.25, "embed_size": 14, "mlp_size": 11,
        "num_heads": 2, "num_layers": 2, "model_seed": seed, "pretrain_seed": seed, "true_seed": 7, "sampling_seed": 5 + seed,
        "include_output": True,
    }  # fmt: skip
    data = {
        "task_config": task,
        "num_steps": 23,
        "batch_size": 13,
        "eval_batch_size": 17,
        "optimizer_config": {"lr": 0.01},
        "checkpointer_config": {"checkpoint_steps": {"linear_space": 5}, "state_every": 7},
        "logger_config": {"logging_steps": {"linear_space": 4}, "loss_every": 3},
        **changes,
    }
    return TrainingConfig.parse(data).resolved()


def run(configs: list[TrainingConfig], root: Path, stop_after: int | None = None):
    checkpoints = [Checkpoints(LocalStore(root), config.name) for config in configs]
    trackers = [
        LocalTracker(root / "icl" / config.name, first_missing_step(config, each))
        for config, each in zip(configs, checkpoints, strict=True)
    ]
    blocks = itertools.count()
    members = [Member(*parts) for parts in zip(configs, checkpoints, trackers, strict=True)]
    return train_members(members, CPU, should_stop=lambda: stop_after is not None and next(blocks) >= stop_after)


def run_solo(config: TrainingConfig, root: Path):
    checkpoints = Checkpoints(LocalStore(root), config.name)
    return train(config, checkpoints, LocalTracker(root / "icl" / config.name, first_missing_step(config, checkpoints)))


def weights(config: TrainingConfig, root: Path, step: int) -> dict[str, torch.Tensor]:
    return Checkpoints(LocalStore(root), config.name).load(step)


@pytest.mark.parametrize("num_tasks", [None, 29])
def test_members_see_the_data_of_their_solo_runs(num_tasks):
    laws = [RegressionTask(3, 5, 0.25, num_tasks, task_seed=seed) for seed in SEEDS]
    streams = [Stream(seed, "training") for seed in SEEDS]
    source = EnsembleBatches(laws, streams, 13, CPU)
    steps = (0, 1, 1009)
    xs, ys = source(torch.tensor(steps))
    for row, step in enumerate(steps):
        for member, (law, stream) in enumerate(zip(laws, streams, strict=True)):
            own_xs, own_ys = law.sample(stream, step, 13)
            assert torch.equal(xs[row, member], own_xs)
            assert torch.equal(ys[row, member], own_ys)


def test_members_with_other_laws_are_refused():
    laws = [RegressionTask(3, 5, 0.25), RegressionTask(3, 5, 0.5)]
    with pytest.raises(ValueError, match="must share"):
        EnsembleBatches(laws, [Stream(0, "a"), Stream(1, "a")], 13, CPU)


def test_batched_gradients_are_those_of_each_member():
    shape = TransformerShape(3, 5, 14, 11, 2, 2)
    flats = torch.stack([flatten(initial_parameters(shape, seed)) for seed in SEEDS]).double()
    xs, ys = Stream(1, "xs").normal(0, (3, 13, 5, 3)).double(), Stream(1, "ys").normal(0, (3, 13, 5, 1)).double()
    losses, gradients = batched_loss_and_grad(shape, flats, xs, ys)
    for member in range(3):
        loss, gradient = loss_and_grad(shape, flats[member], xs[member], ys[member])
        torch.testing.assert_close(losses[member], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients[member], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"lr": 0.01, "weight_decay": 0.01},
        {"optimizer_type": "AdamW", "lr": 0.01, "weight_decay": 0.1},
        {"optimizer_type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_members_train_as_they_do_alone(optimizer, tmp_path):
    configs = [make_config(seed, 29, optimizer_config=optimizer) for seed in SEEDS]
    outcomes = run(configs, tmp_path / "together")
    assert all(outcome.finished for outcome in outcomes)
    for config, outcome in zip(configs, outcomes, strict=True):
        alone = run_solo(config, tmp_path / "alone")
        assert alone.summary == pytest.approx(outcome.summary, rel=1e-4, abs=1e-5)
        for step in config.checkpoint_steps():
            ours, theirs = weights(config, tmp_path / "together", step), weights(config, tmp_path / "alone", step)
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
        rows = [read_metrics(tmp_path / kind / "icl" / config.name) for kind in ("together", "alone")]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
        for ours, theirs in zip(*rows, strict=True):
            assert ours["batch/loss"] == pytest.approx(theirs["batch/loss"], rel=1e-5)


@pytest.mark.slow
def test_losses_agree_with_solo_runs_for_a_thousand_steps():
    """On the paper's schedule. Rounding grows along training, because a trajectory is chaotic, and faster at larger rates."""
    configs = [make_config(seed, num_steps=500_000, optimizer_config={"lr": 0.003}) for seed in SEEDS]
    together = AcceleratorStepper(configs, 0, [{}] * len(configs), CPU).run(1000)
    for member, config in enumerate(configs[:1]):
        alone = AcceleratorStepper([config], 0, [{}], CPU).run(1000)[:, 0]
        torch.testing.assert_close(together[:100, member], alone[:100], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[:, member], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_resuming_the_same_group_is_exact(stop_after, tmp_path):
    configs = [make_config(seed) for seed in SEEDS]
    run(configs, tmp_path / "whole")
    assert not any(outcome.finished for outcome in run(configs, tmp_path / "parts", stop_after))
    assert all(outcome.finished for outcome in run(configs, tmp_path / "parts"))
    for config in configs:
        for step in config.checkpoint_steps():
            whole, parts = weights(config, tmp_path / "whole", step), weights(config, tmp_path / "parts", step)
            assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_solo_run_goes_on_in_a_batch_and_members_at_other_steps_too(tmp_path):
    configs = [make_config(seed) for seed in SEEDS]
    run(configs[:1], tmp_path, stop_after=2)
    outcomes = run(configs, tmp_path)
    assert [outcome.finished for outcome in outcomes] == [True] * 3
    assert all(outcome.finished for outcome in run(configs, tmp_path))
    alone = run_solo(configs[0], tmp_path / "alone")
    assert alone.summary == pytest.approx(outcomes[0].summary, rel=1e-4, abs=1e-5)


def test_a_diverging_member_is_named(tmp_path):
    configs = [make_config(seed, optimizer_config={"optimizer_type": "SGD", "lr": 1e30}) for seed in SEEDS[:1]]
    with pytest.raises(TrainingDiverged, match=r"Lower optimizer_config\.lr"):
        run(configs, tmp_path)


def test_members_must_differ_in_seeds_alone(tmp_path):
    with pytest.raises(ValueError, match="differ only in their seeds"):
        run([make_config(1), make_config(2, batch_size=17)], tmp_path)


SWEEP = """\
method: grid
parameters:
  task_config:
    parameters:
      task_size: {value: 3}
      max_examples: {value: 5}
      num_tasks: {values: [inf, 7]}
      embed_size: {value: 14}
      mlp_size: {value: 11}
      num_heads: {value: 2}
      num_layers: {value: 1}
      model_seed: {values: [1, 2]}
      sampling_seed: {value: 3}
  num_steps: {value: 12}
  batch_size: {value: 13}
  eval_batch_size: {value: 17}
  checkpointer_config:
    parameters:
      checkpoint_steps: {value: {linear_space: 4}}
"""


def test_the_command_trains_a_sweep_in_batches_and_each_run_has_files_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    for kind, executor in (("together", "batch"), ("alone", "local")):
        monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / kind))
        # Two groups of two: the seeds of each number of tasks.
        for _ in range(2):  # the second call finds nothing to do
            words = {"executor": executor, "tracking": "local", "overrides": [], "jobs": None}
            points = [None] if executor == "batch" else range(4)
            for index in points:
                assert run_sweep_command("train", tmp_path / "sweep.yaml", index, **words) == 0
    together, alone = (
        {run.name: run for run in list_runs(LocalStore(tmp_path / kind))} for kind in ("together", "alone")
    )
    assert len(together) == 4
    assert together.keys() == alone.keys()
    for name, summary in together.items():
        assert summary.state == "finished"
        ours, theirs = (Checkpoints(LocalStore(tmp_path / kind), name) for kind in ("together", "alone"))
        assert ours.steps() == theirs.steps()
        for key, value in ours.load(11).items():
            torch.testing.assert_close(value, theirs.load(11)[key], rtol=1e-4, atol=1e-5)
        rows = [read_metrics(tmp_path / kind / "icl" / name) for kind in ("together", "alone")]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]


def test_runs_are_batched_by_themselves_on_an_accelerator_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("icl.execution.training_runs.wandb_is_set_up", lambda: False)
    place = Surroundings(LocalStore(tmp_path), tmp_path, torch.device("meta"))
    assert batches_runs(place)
    assert not batches_runs(replace(place, device=CPU))
    assert not batches_runs(replace(place, tracking="wandb"))
