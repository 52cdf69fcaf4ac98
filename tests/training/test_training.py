"""The training loop: equal to a textbook loop, exact to resume, safe when it diverges."""

import itertools
from pathlib import Path

import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.model import InContextRegressionTransformer
from icl.storage import LocalStore
from icl.tracking import LocalTracker
from icl.training import TrainingDiverged, first_missing_step, train
from icl.training.standing import data_stream

TASK = {
    "task_size": 3, "max_examples": 5, "num_tasks": "inf", "noise_variance": 0.25, "embed_size": 14, "mlp_size": 11, "num_heads": 2,
    "num_layers": 2, "model_seed": 1, "pretrain_seed": None, "true_seed": None, "sampling_seed": None, "include_output": True,
}  # fmt: skip


def make_config(**changes) -> TrainingConfig:
    data = {
        "task_config": TASK,
        "num_steps": 23,
        "batch_size": 13,
        "eval_batch_size": 17,
        "optimizer_config": {"lr": 0.01},
        "checkpointer_config": {"checkpoint_steps": {"linear_space": 5}, "state_every": 7},
        "logger_config": {"logging_steps": {"linear_space": 4}, "loss_every": 3},
        **changes,
    }
    return TrainingConfig.parse(data).resolved()


def run(config: TrainingConfig, root: Path, stop_after: int | None = None):
    """One call of `train`, asked to stop after a number of further steps."""
    checkpoints = Checkpoints(LocalStore(root), config.name)
    with checkpoints.lock():
        tracker = LocalTracker(root / "icl" / config.name, first_missing_step(config, checkpoints))
        counter = itertools.count()
        outcome = train(
            config, checkpoints, tracker, should_stop=lambda: stop_after is not None and next(counter) >= stop_after
        )
        tracker.finish("finished" if outcome.finished else "interrupted")
    return outcome


def contents(root: Path) -> dict[str, bytes]:
    skipped = {".lock", ".json"}
    return {
        str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix not in skipped
    }


def test_training_follows_the_textbook_loop(tmp_path):
    config = make_config()
    run(config, tmp_path)
    shape, stream = config.task_config.shape, data_stream(config)
    model = InContextRegressionTransformer.from_shape(shape, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    factor = 23 / 2 - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.01, total_steps=23, pct_start=0.5, anneal_strategy="linear", div_factor=factor,
        final_div_factor=factor, cycle_momentum=False,
    )  # fmt: skip
    checkpoints = Checkpoints(LocalStore(tmp_path), config.name)
    task = config.task_config.pretrain_task()
    for step in range(23):
        xs, ys = task.sample(stream, step, 13)
        loss = torch.nn.functional.mse_loss(model(xs, ys), ys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step < 22:
            schedule.step()
        if step in config.checkpoint_steps():  # checkpoint t holds t + 1 updates
            for name, value in checkpoints.load(step).items():
                torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("stop_after", [1, 6, 7, 8, 22])
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path, stop_after):
    config = make_config()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config, whole).finished
    outcome = run(config, parts, stop_after)
    assert not outcome.finished
    assert outcome.steps_done == stop_after
    assert run(config, parts).finished
    assert contents(parts) == contents(whole)


def test_a_finished_run_is_not_done_again(tmp_path):
    config = make_config()
    run(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run(config, tmp_path).finished
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_a_denser_grid_of_the_same_run_fills_the_gaps_with_the_same_weights(tmp_path):
    sparse, dense = make_config(), make_config(checkpointer_config={"checkpoint_steps": {"linear_space": 23}})
    assert sparse.name == dense.name
    run(sparse, tmp_path)
    checkpoints = Checkpoints(LocalStore(tmp_path), sparse.name)
    before = {step: checkpoints.load(step) for step in checkpoints.steps()}
    run(dense, tmp_path)
    assert checkpoints.steps() == dense.checkpoint_steps()
    for step, tensors in before.items():
        again = checkpoints.load(step)
        assert all(torch.equal(value, again[name]) for name, value in tensors.items())


def test_the_metrics_file_has_the_logged_steps_once_each(tmp_path):
    from icl.tracking import read_metrics

    config = make_config()
    run(config, tmp_path, stop_after=9)
    run(config, tmp_path)
    rows = read_metrics(tmp_path / "icl" / config.name)
    assert [row["step"] for row in rows] == sorted({*config.logging_steps(), *range(0, 23, 3)})
    assert {row["step"] for row in rows if "pretrain/mse" in row} == set(config.logging_steps())


def test_a_diverged_run_stops_and_keeps_its_good_checkpoints(tmp_path):
    config = make_config(
        optimizer_config={"optimizer_type": "SGD", "lr": 1e20},
        scheduler_config={"scheduler_type": "constant"},
        checkpointer_config={"checkpoint_steps": [0], "state_every": 1},
    )
    with pytest.raises(TrainingDiverged, match=r"the loss became (nan|inf).*Lower optimizer_config.lr"):
        run(config, tmp_path)
    checkpoints = Checkpoints(LocalStore(tmp_path), config.name)
    assert checkpoints.steps() == [0]
    assert checkpoints.newest_state() is not None


def test_different_seeds_see_different_data_and_the_same_seed_the_same():
    first, same, other = (make_config(task_config={**TASK, "model_seed": seed}) for seed in (1, 1, 2))
    batches = [
        config.task_config.pretrain_task().sample(data_stream(config), 3, 7)[0] for config in (first, same, other)
    ]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
