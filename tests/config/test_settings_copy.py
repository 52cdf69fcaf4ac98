"""Copies of settings with other values."""

import pytest

from icl.config import ConfigError, TrainingConfig
from icl.estimation import LLCConfig


def test_a_copy_takes_a_key_of_a_flattened_record():
    config = LLCConfig.parse({"task_config": {"task_size": 3}, "num_steps": 60})
    changed = config.model_copy(update={"num_steps": 777})
    assert (changed.training.num_steps, changed.training.task_config.task_size) == (777, 3)
    assert config.training.num_steps == 60


def test_a_copy_refuses_what_a_new_record_refuses():
    with pytest.raises(ConfigError, match="did you mean"):
        TrainingConfig().model_copy(update={"num_step": 7})
    assert TrainingConfig().model_copy() == TrainingConfig()
