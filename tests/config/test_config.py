"""Configuration: step grids with known counts, names, seeds, schedules, and errors that name the key."""

import json
import math

import pytest
import torch

from icl.config import ConfigError, TrainingConfig, expand_steps

STEPS = 500_000


@pytest.mark.parametrize(
    ("grid", "reached"),
    [
        ({"log_space": 100, "linear_space": 100}, 190),
        ({"log_space": 100, "linear_space": 10_000}, 10_089),
        ({"log_space": 100, "linear_space": 50_000}, 50_078),
        ({"log_space": 100, "linear_space": 200}, 290),
        ({"log_space": 100, "linear_space": 10_000, "log_subsample": 50, "linear_subsample": 50}, 202),
        ({"log_space": 100}, 91),
        ({"linear_space": [0, 100, 11]}, 11),
        ([3, 5, 5, 600_000], 2),
        (None, 0),
    ],
)
def test_step_grids_reach_the_published_number_of_steps(grid, reached):
    steps = expand_steps(grid, num_steps=STEPS)
    assert len(steps) == reached
    assert steps == sorted(set(steps))
    assert all(0 <= step < STEPS for step in steps)


def test_grid_values_are_truncated_not_rounded():
    assert expand_steps({"linear_space": 4}, 11) == [0, 3, 7]  # 0, 3.67, 7.33, 11
    assert 499_999 in expand_steps({"log_space": 100}, STEPS)


@pytest.mark.parametrize(
    "grid", [{"log": 3}, {"log_space": -1}, {"log_space": [0, 10, 3]}, {"linear_space": [0, 10]}, {"linear_space": "x"}, [-1], [1.5],
             {"log_space": 5, "log_subsample": 0}]
)  # fmt: skip
def test_malformed_grids_are_refused(grid):
    with pytest.raises(ConfigError):
        expand_steps(grid, 100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task_confg": {}}, "unknown key 'task_confg': did you mean 'task_config'"),
        ({"task_config": {"taks_size": 3}}, "unknown key 'task_config.taks_size': did you mean 'task_size'"),
        ({"num_steps": "many"}, "num_steps: .*got 'many'"),
        ({"task_config": {"task_size": -3}}, "task_config.task_size: .*got -3"),
        ({"task_config": {"max_examples": 0}}, "task_config.max_examples: .*got 0"),
        ({"task_config": {"num_heads": 3}}, "num_heads=3 does not divide embed_size=128"),
        ({"task_config": {"num_tasks": "infinite"}}, "task_config.num_tasks"),
        ({"task_config": {"noise_variance": float("nan")}}, "task_config.noise_variance"),
        ({"optimizer_config": {"lr": 0}}, "optimizer_config.lr"),
        ({"optimizer_config": {"betas": [2, 0.9]}}, "optimizer_config.betas.0: .*less than 1"),
        ({"optimizer_config": {"betas": [0.9, -1]}}, "optimizer_config.betas.1: .*greater than or equal to 0"),
        ({"optimizer_config": {"momentum": 0.9}}, "momentum is a setting of SGD"),
        ({"scheduler_config": {"scheduler_type": "StepLR"}}, "scheduler_config.scheduler_type"),
        ({"checkpointer_config": {"checkpoint_steps": {"log": 3}}}, "unknown step grid 'log'"),
        ({"batch_size": None}, "batch_size"),
        (
            {"scheduler_config": {"final_div_factor": math.inf}},
            "scheduler_config.final_div_factor: must be a finite number; leave it out",
        ),
        ({"optimizer_config": {"weight_decay": math.inf}}, "optimizer_config.weight_decay: must be a finite number"),
        ({"optimizer_config": {"betas": [0.9, "nan"]}}, "optimizer_config.betas.1: must be a finite number"),
    ],
)
def test_errors_are_one_line_that_names_the_key(data, message):
    with pytest.raises(ConfigError, match=message) as error:
        TrainingConfig.parse(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_tasks", ["inf", float("inf")])
def test_infinitely_many_tasks_survive_json(num_tasks):
    config = TrainingConfig.parse({"task_config": {"num_tasks": num_tasks}})
    assert config.task_config.num_tasks is None
    assert TrainingConfig.parse(json.loads(config.model_dump_json())) == config


def test_the_name_follows_what_decides_the_weights_and_nothing_else():
    base = TrainingConfig()
    same = [
        {"eval_batch_size": 7},
        {"checkpointer_config": {"checkpoint_steps": [1]}},
        {"logger_config": {"loss_every": 3}},
    ]
    other = [
        {"num_steps": 7},
        {"batch_size": 7},
        {"optimizer_config": {"lr": 0.5}},
        {"task_config": {"model_seed": 5}},
        {"task_config": {"residual": "single"}},
        {"scheduler_config": {"pct_start": 0.3}},
    ]
    assert all(TrainingConfig.parse(data).name == base.name for data in same)
    names = [TrainingConfig.parse(data).name for data in other]
    assert len({base.name, *names}) == len(other) + 1


def test_null_seeds_become_numbers_that_follow_the_model_seed():
    null = dict.fromkeys(("pretrain_seed", "true_seed", "sampling_seed"))
    config = TrainingConfig.parse({"task_config": {"model_seed": 4, **null}})
    resolved = config.resolved()
    assert resolved == config.resolved()
    assert resolved.name == config.name
    seeds = [getattr(resolved.task_config, name) for name in null]
    assert len(set(seeds)) == 3
    other = TrainingConfig.parse({"task_config": {"model_seed": 5, **null}}).resolved()
    assert other.task_config.sampling_seed != resolved.task_config.sampling_seed


def test_a_null_model_seed_is_drawn_and_recorded():
    config = TrainingConfig.parse({"task_config": {"model_seed": None}})
    drawn = {config.resolved().task_config.model_seed for _ in range(5)}
    assert len(drawn) > 1
    assert None not in drawn


@pytest.mark.parametrize("num_steps", [2, 7, 10, 1000])
@pytest.mark.parametrize(("strategy", "pct_start"), [("linear", 0.5), ("cos", 0.3)])
def test_the_schedule_equals_torchs_one_cycle(num_steps, strategy, pct_start):
    config = TrainingConfig.parse(
        {
            "num_steps": num_steps,
            "optimizer_config": {"lr": 0.003},
            "scheduler_config": {
                "anneal_strategy": strategy,
                "pct_start": pct_start,
                "div_factor": 19.0,
                "final_div_factor": 23.0,
            },
        }
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.003, total_steps=num_steps, pct_start=pct_start, anneal_strategy=strategy, div_factor=19.0,
            final_div_factor=23.0, cycle_momentum=False,
        )  # fmt: skip
    except ZeroDivisionError:
        return  # torch refuses a cycle whose rise has no step; ours starts at the top
    for step in range(num_steps):
        assert config.learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < num_steps - 1:
            schedule.step()


def test_the_papers_schedule_peaks_in_the_middle_and_ends_at_almost_nothing():
    config = TrainingConfig.parse({"optimizer_config": {"lr": 0.003}})
    assert config.learning_rate(0) == pytest.approx(0.003 / 249_999)
    assert config.learning_rate(249_999) == pytest.approx(0.003)
    assert config.learning_rate(499_999) < 1e-12
