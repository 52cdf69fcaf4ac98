"""The XLA path, run for real (PJRT_DEVICE=CPU compiles with XLA for this machine's CPU): the numbers are those of the
plain CPU, and after a warm-up nothing is compiled any more."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as xla_metrics  # pyright: ignore[reportMissingImports]

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.devices import resolve_device
from icl.estimation import LLCConfig, estimate_at_checkpoint
from icl.estimation.estimate import estimate_at_checkpoints
from icl.model import flatten, initial_parameters, parameter_layout, unflatten
from icl.storage import LocalStore
from icl.streams import Stream
from icl.tasks import RegressionTask
from icl.tracking import LocalTracker, read_metrics
from icl.training import train

XLA, CPU = resolve_device("xla"), resolve_device("cpu")
TASK = {
    "task_size": 3, "max_examples": 5, "num_tasks": "inf", "noise_variance": 0.25, "embed_size": 14, "mlp_size": 11, "num_heads": 2,
    "num_layers": 2, "model_seed": 1, "pretrain_seed": 2, "true_seed": 3, "sampling_seed": 4,
}  # fmt: skip
STEPS = 200


def compilations() -> int:
    """Graphs compiled so far in this process."""
    data = xla_metrics.metric_data("CompileTime")
    return 0 if data is None else data[0]


@dataclass
class Trained:
    """What one run left behind."""

    losses: list[float]
    checkpoints: Checkpoints
    before: int
    """Graphs compiled before the run."""
    compiled: dict[int, int] = field(default_factory=dict)
    """Graphs compiled when so many steps were done."""


def train_on(device: torch.device, folder: Path, num_tasks: int | str) -> Trained:
    config = TrainingConfig.parse(
        {
            "task_config": TASK | {"num_tasks": num_tasks},
            "num_steps": STEPS,
            "batch_size": 61,
            "eval_batch_size": 17,
            "optimizer_config": {"lr": 0.001},
            "checkpointer_config": {"checkpoint_steps": {"linear_space": 9}, "state_every": 50},
            "logger_config": {"logging_steps": {"linear_space": 4}, "loss_every": 1},
        }
    ).resolved()
    checkpoints = Checkpoints(LocalStore(folder), config.name)
    tracker = LocalTracker(folder / "metrics", 0)
    done = Trained([], checkpoints, compilations())
    outcome = train(
        config, checkpoints, tracker, device, on_step=lambda step, loss: done.compiled.update({step: compilations()})
    )
    tracker.finish()
    assert outcome.finished
    done.losses += [row["batch/loss"] for row in read_metrics(folder / "metrics")]
    return done


@pytest.fixture(scope="module", params=["inf", 29])
def runs(request, tmp_path_factory) -> tuple[Trained, Trained]:
    return tuple(train_on(device, tmp_path_factory.mktemp(device.type), request.param) for device in (XLA, CPU))


def test_random_bits_are_those_of_the_cpu():
    stream = Stream(7, "xla-test")
    for step in (0, 1, 2**31 + 5):
        assert torch.equal(stream.uniform(step, (1009,), XLA).cpu(), stream.uniform(step, (1009,)))
        assert torch.equal(stream.integers(step, 29, (1009,), XLA).cpu(), stream.integers(step, 29, (1009,)))
        torch.testing.assert_close(
            stream.normal(step, (1009,), XLA).cpu(), stream.normal(step, (1009,)), rtol=1e-5, atol=1e-6
        )


def test_drawing_at_another_step_compiles_nothing():
    law, stream = RegressionTask(3, 5, 0.25), Stream(7, "xla-test")
    counts = []
    for step in range(5):
        law.sample(stream, step, 13, XLA)
        torch_xla.sync()
        counts.append(compilations())
    assert len(set(counts[1:])) == 1


def test_losses_are_those_of_the_cpu(runs):
    on_xla, on_cpu = runs
    assert len(on_xla.losses) == STEPS
    assert on_xla.losses == pytest.approx(on_cpu.losses, abs=1e-4)
    assert sum(on_cpu.losses[-50:]) < sum(on_cpu.losses[:50])


def test_training_compiles_one_graph_for_data_and_one_for_a_step(runs):
    counts = [count for _, count in sorted(runs[0].compiled.items())]
    assert len(counts) >= 10
    assert set(counts) == {counts[0]}, "something was compiled after the first block"
    assert counts[0] - runs[0].before <= 3, "zeros to begin with, data, step"


def test_checkpoints_come_from_the_device_whole(runs):
    on_xla, on_cpu = (run.checkpoints for run in runs)
    assert on_xla.steps() == on_cpu.steps()
    for step in on_xla.steps():
        ours, theirs = on_xla.load(step), on_cpu.load(step)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)
    first, last = on_xla.load(on_xla.steps()[0]), on_xla.load(on_xla.steps()[-1])
    assert all((first[name] != last[name]).any() for name in first)
    state = on_xla.newest_state()
    assert state is not None
    assert state.step == STEPS
    flat = torch.cat([last[name].flatten() for name in parameter_layout(config_of_shape())])
    assert torch.equal(state.tensors["flat"], flat)


def config_of_shape():
    return TrainingConfig.parse({"task_config": TASK}).task_config.shape


@pytest.mark.parametrize("origin", ["infinite-dataset", "eval-dataset"])
def test_an_estimate_is_that_of_the_cpu_and_compiles_nothing_once_it_runs(origin):
    sampler = {
        "epsilon": 1e-4, "gamma": 10.0, "nbeta": 20.0, "num_chains": 3, "num_draws": 30, "num_burnin_steps": 10,
        "grad_batch_size": 19, "grad_batch_origin": origin, "eval_dataset_size": 200, "init_seed": 5, "per_token": True,
    }  # fmt: skip
    config = LLCConfig.parse({"task_config": TASK, "sampler_config": sampler})
    shape = config.training.task_config.shape
    weights = unflatten(shape, flatten(initial_parameters(shape, 1)))
    compiled = []
    on_xla = estimate_at_checkpoint(config, weights, XLA, lambda done, total: compiled.append(compilations()))
    on_cpu = estimate_at_checkpoint(config, weights, CPU)
    # One graph for the first step, one for a step of burn-in, one for a step with a draw.
    assert len(set(compiled[1:10])) == len(set(compiled[10:])) == 1
    assert compiled[-1] - compiled[0] <= 2
    torch.testing.assert_close(on_xla.loss_trace.cpu(), on_cpu.loss_trace, rtol=1e-4, atol=1e-5)
    assert on_xla.llc_mean == pytest.approx(on_cpu.llc_mean, abs=0.1 * on_cpu.llc_mcse)

    before = compilations()
    other = unflatten(shape, flatten(initial_parameters(shape, 2)))
    assert estimate_at_checkpoint(config, other, XLA).llc_mean != on_xla.llc_mean
    assert compilations() == before, "the next checkpoint compiles anew"


def test_checkpoints_that_share_a_batch_have_the_estimates_of_the_cpu_and_the_next_batch_compiles_nothing():
    sampler = {
        "epsilon": 1e-4, "gamma": 10.0, "nbeta": 20.0, "num_chains": 2, "num_draws": 10, "grad_batch_size": 19, "init_seed": 5,
    }  # fmt: skip
    config = LLCConfig.parse({"task_config": TASK, "sampler_config": sampler})
    shape = config.training.task_config.shape
    weights = [unflatten(shape, flatten(initial_parameters(shape, seed))) for seed in range(6)]
    for each, on_xla in zip(weights[:3], estimate_at_checkpoints(config, weights[:3], XLA), strict=True):
        on_cpu = estimate_at_checkpoint(config, each, CPU)
        torch.testing.assert_close(on_xla.loss_trace, on_cpu.loss_trace, rtol=1e-4, atol=1e-5)
    before = compilations()
    assert len({result.llc_mean for result in estimate_at_checkpoints(config, weights[3:], XLA)}) == 3
    assert compilations() == before, "the next checkpoints compile anew"


def test_device_names_that_override(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("xla").type == "xla"
