"""Training many seeds on one device: gradients, data, captured steps, resuming, and one member's misfortune."""

import pytest
import torch
from torch import Tensor

from icl.config import TrainingConfig
from icl.engine import batched_loss_and_grad, loss_and_grad
from icl.model import TransformerShape, flatten, initial_parameters, unflatten
from icl.streams import Stream
from icl.tasks import EnsembleBatches, RegressionTask
from icl.training.accelerator import AcceleratorStepper

CPU = torch.device("cpu")
SEEDS = (3, 11, 2)


def config_of(seed: int, **changes) -> TrainingConfig:
    task = {
        "task_size": 3, "max_examples": 5, "num_tasks": 29, "noise_variance": 0.25, "embed_size": 14, "mlp_size": 11,
        "num_heads": 2, "num_layers": 2, "model_seed": seed, "pretrain_seed": seed, "true_seed": 7, "sampling_seed": 5 + seed,
    }  # fmt: skip
    data = {"task_config": task, "num_steps": 61, "batch_size": 13, "optimizer_config": {"lr": 0.01}, **changes}
    return TrainingConfig.parse(data).resolved()


def stepper(device: torch.device, seeds=SEEDS, step: int = 0, states=None, **options) -> AcceleratorStepper:
    return AcceleratorStepper([config_of(seed) for seed in seeds], step, states or [{}] * len(seeds), device, **options)


def end_of(states: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([state["flat"] for state in states])


def test_gradients_are_those_of_float64(device):
    shape = TransformerShape(3, 5, 14, 11, 2, 2)
    flats = torch.stack([flatten(initial_parameters(shape, seed)) for seed in SEEDS])
    xs, ys = Stream(1, "xs").normal(0, (3, 13, 5, 3)), Stream(1, "ys").normal(0, (3, 13, 5, 1))
    _, gradients = batched_loss_and_grad(shape, flats.to(device), xs.to(device), ys.to(device))
    for flat, x, y, gradient in zip(flats, xs, ys, gradients.cpu(), strict=True):
        _, exact = loss_and_grad(shape, flat.double(), x.double(), y.double())
        for ours, theirs in zip(unflatten(shape, gradient).values(), unflatten(shape, exact).values(), strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("num_tasks", [None, 29])
def test_data_are_those_of_the_cpu_bit_for_bit(device, num_tasks):
    laws = [RegressionTask(3, 5, 0.25, num_tasks, task_seed=seed) for seed in SEEDS]
    streams, steps = [Stream(seed, "training") for seed in SEEDS], torch.tensor([0, 1, 1009])
    here = EnsembleBatches(laws, streams, 13, device)(steps.to(device))
    there = EnsembleBatches(laws, streams, 13, CPU)(steps)
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_a_captured_step_is_the_step(device):
    captured, plain = stepper(device), stepper(device, capture=False)
    losses = captured.run(37), plain.run(37)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end_of(captured.states()), end_of(plain.states()), rtol=1e-4, atol=1e-5)


def test_seeds_in_a_batch_train_as_they_do_alone(device):
    together = stepper(device).run(37)
    for member, seed in enumerate(SEEDS):
        alone = stepper(device, [seed]).run(37)
        torch.testing.assert_close(together[:, member], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_cpu(device):
    torch.testing.assert_close(stepper(device).run(37), stepper(CPU).run(37), rtol=1e-3, atol=1e-4)


def test_two_runs_end_in_the_same_bytes(device):
    first, second = stepper(device), stepper(device)
    assert torch.equal(first.run(61), second.run(61))
    assert torch.equal(end_of(first.states()), end_of(second.states()))


def test_a_run_that_goes_on_from_its_state_ends_in_the_same_bytes(device):
    whole, begun = stepper(device), stepper(device)
    losses = whole.run(61)
    before = begun.run(23)
    resumed = stepper(device, step=23, states=begun.states())
    assert torch.equal(torch.cat((before, resumed.run(38))), losses)
    assert torch.equal(end_of(resumed.states()), end_of(whole.states()))


def test_one_member_that_is_lost_does_not_touch_the_others(device):
    broken = stepper(device)
    broken.flats[1] = float("nan")
    losses = broken.run(23)
    assert torch.isnan(losses[:, 1]).all()
    sound = stepper(device).run(23)
    assert torch.equal(losses[:, [0, 2]], sound[:, [0, 2]])
