import pytest
import torch

from icl.analysis.hessian import exact_hessian, regression_loss
from icl.checkpoints import Checkpoints
from icl.estimation import LLCConfig, estimate_over_run, hessian_at_checkpoint
from icl.model import InContextRegressionTransformer, initial_parameters, unflatten
from icl.settings import ConfigError
from icl.storage import LocalStore
from icl.streams import Stream

TASK = {
    **{"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 2, "num_layers": 1},
    **{"num_tasks": "inf", "model_seed": 7, "pretrain_seed": None, "true_seed": None, "sampling_seed": None},
}
SAMPLER = {"epsilon": 1e-4, "gamma": 1.0, "nbeta": 10.0, "num_chains": 2, "num_draws": 3, "grad_batch_size": 11}
PRESENT = [0, 1, 7, 30, 59]


def config_with(**others) -> LLCConfig:
    return LLCConfig.parse(
        {"task_config": TASK, "sampler_config": {**SAMPLER, "init_seed": 5}, "num_steps": 60, **others}
    )


@pytest.mark.parametrize(
    ("choice", "steps"),
    [
        ({}, PRESENT),
        ({"step": 6}, [7]),
        ({"checkpoint_idx": -1}, [59]),
        ({"steps": [0, 28, 33, 59]}, [0, 30, 59]),
        ({"steps": [0, 28, 59], "testing": True}, [0, 59]),
    ],
)
def test_the_checkpoints_that_a_sweep_chooses(choice, steps):
    assert config_with(**choice).chosen_steps(PRESENT) == steps


def test_a_choice_that_cannot_be_met_says_why():
    with pytest.raises(ConfigError, match="train it first"):
        config_with().chosen_steps([])
    with pytest.raises(ConfigError, match="the run has 5 checkpoints"):
        config_with(checkpoint_idx=5).chosen_steps(PRESENT)
    with pytest.raises(ConfigError, match="has checkpoints up to step 30 only; train it on"):
        config_with(steps=[0, 31]).chosen_steps(PRESENT[:-1])
    assert config_with(step=10**6).chosen_steps(PRESENT) == [59]
    with pytest.raises(ConfigError, match="step and checkpoint_idx both choose"):
        config_with(step=1, checkpoint_idx=1)


def test_the_hessian_metric_is_the_exact_hessian_of_the_first_sequences():
    config = config_with(sampler_config={**SAMPLER, "init_seed": 5, "num_evals": 2, "eval_metrics": ["hessian"]})
    shape = config.task_config.shape
    weights = dict(unflatten(shape, initial_parameters_of(config)))
    row = hessian_at_checkpoint(config, weights)
    law = config.task_config.resolved().pretrain_task()
    xs, ys = law.sample(Stream(5, "sampling").child("dataset"), 0, 11)
    model = InContextRegressionTransformer.from_shape(shape, seed=0)
    model.load_state_dict(weights)
    eigenvalues = torch.linalg.eigvalsh(exact_hessian(*regression_loss(model, xs, ys)))
    by_size = eigenvalues[eigenvalues.abs().argsort(descending=True)]
    assert row["hessian/evals/0"] == pytest.approx(float(by_size[0]), rel=1e-3)
    assert row["hessian/evals/1"] == pytest.approx(float(by_size[1]), rel=1e-2)
    assert abs(row["hessian/trace"] - float(eigenvalues.sum())) < 6 * row["hessian/trace_std_error"] + 1e-6


def initial_parameters_of(config: LLCConfig) -> torch.Tensor:
    from icl.model import flatten

    return flatten(initial_parameters(config.task_config.shape, 7))


def test_an_estimate_that_is_cut_short_is_not_recorded(tmp_path):
    config = config_with()
    checkpoints = Checkpoints(LocalStore(tmp_path), config.name)
    weights = dict(unflatten(config.task_config.shape, initial_parameters_of(config)))
    for step in (0, 1, 7):
        checkpoints.save(step, weights)
    recorded, calls = [], []

    def count(done: int, total: int) -> None:
        calls.append((done, total))

    left = estimate_over_run(
        config,
        checkpoints,
        [0],
        lambda step, result: recorded.append(step),
        progress=count,
        should_stop=lambda: bool(recorded),
    )
    assert (left, recorded) == (1, [1])
    assert all(0 <= done <= total for done, total in calls)
    assert calls
