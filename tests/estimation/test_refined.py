"""Refined learning coefficients from settings: other data, and a part of the weights."""

import pytest
import torch

from icl.config import ConfigError
from icl.estimation import LLCConfig, estimate_at_checkpoint
from icl.model import InContextRegressionTransformer
from icl.subjects.regression import sampling_batches

TASK = {
    **{"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 2, "num_layers": 1},
    **{"num_tasks": 3, "model_seed": 7, "pretrain_seed": 1, "true_seed": 2, "sampling_seed": 3},
}
SAMPLER = {
    "epsilon": 1e-4,
    "gamma": 1.0,
    "nbeta": 10.0,
    "num_chains": 2,
    "num_draws": 3,
    "grad_batch_size": 11,
    "init_seed": 5,
}


def config_with(sampler=None, **others) -> LLCConfig:
    return LLCConfig.parse(
        {"task_config": TASK, "sampler_config": {**SAMPLER, **(sampler or {})}, "num_steps": 60, **others}
    )


def weights(config):
    return InContextRegressionTransformer.from_shape(config.training.task_config.shape, seed=0).state_dict()


def loss_of(config, law, draw):
    """The loss of w* on the new evaluation batch of a draw, of tasks of a law."""
    task = config.training.task_config.resolved()
    task = task.pretrain_task() if law == "pretrain" else task.true_task()
    xs, ys = sampling_batches(task, config.sampler_config, 5)[1](draw)
    model = InContextRegressionTransformer.from_shape(config.training.task_config.shape, seed=0)
    with torch.no_grad():
        return float((model(xs, ys) - ys).square().mean())


def test_draws_are_evaluated_on_the_data_that_were_asked_for():
    plain = config_with({"eval_method": "new-minibatch"})
    refined = config_with({"eval_method": "new-minibatch"}, eval_tasks="true")
    first, second = (estimate_at_checkpoint(config, weights(config)) for config in (plain, refined))
    for config, result, law in ((plain, first, "pretrain"), (refined, second, "true")):
        expected = sum(loss_of(config, law, draw) for draw in range(3)) / 3
        assert result.init_loss == pytest.approx(expected, rel=1e-4)
    assert torch.equal(first.run.positions, second.run.positions), "the gradient's data are the same"
    other = estimate_at_checkpoint(config_with(grad_tasks="true"), weights(plain))
    assert not torch.equal(other.run.positions, first.run.positions)


def test_names_tell_refined_estimates_and_others_keep_theirs():
    names = {
        config_with({"eval_method": "dataset"}, **more).name
        for more in (
            {},
            {"eval_tasks": "true"},
            {"grad_tasks": "true"},
            {"grad_tasks": "true", "eval_tasks": "pretrain"},
        )
    }
    assert len(names) == 4
    assert config_with(grad_tasks="pretrain").name == config_with().name


def test_data_that_would_not_be_met_are_refused():
    with pytest.raises(ConfigError, match="eval_tasks='true' has no effect"):
        config_with(eval_tasks="true")
    with pytest.raises(ConfigError, match="settings of the regression run"):
        LLCConfig.parse({"subject": "somewhere:Something", "grad_tasks": "true"})


def test_a_head_of_a_sweep_file_moves_alone():
    config = config_with({"include": ["l0h1"]})
    result = estimate_at_checkpoint(config, weights(config))
    assert result.run.positions.shape[1] == 3 * 2 * 4, "queries, keys and values; this model has no output projection"
    absent = config_with({"include": ["l0h2"]})
    with pytest.raises(ValueError, match="2 heads"):
        estimate_at_checkpoint(absent, weights(absent))
