"""What runs will cost: every part counted as often as the run's own grids say."""

from dataclasses import replace

import pytest
import torch

from icl.config import TrainingConfig
from icl.estimation import LLCConfig
from icl.execution.forecast import forecast_llc, forecast_training, measured_estimate, wall_seconds
from icl.execution.surroundings import Surroundings
from icl.storage import LocalStore

TASK = {"task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1}
SMALL = {"task_config": TASK, "num_steps": 70, "batch_size": 3, "eval_batch_size": 5}


@pytest.fixture
def place(tmp_path) -> Surroundings:
    return Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")


def test_a_forecast_counts_what_the_run_will_leave_and_writes_nothing(place, tmp_path):
    config = TrainingConfig.parse({**SMALL, "checkpointer_config": {"checkpoint_steps": [0, 5, 11]}})
    cost = forecast_training(config, place, measured_s=0.01)
    assert cost.checkpoints == 4  # and the last step
    assert cost.parameters == config.task_config.shape.num_parameters
    assert cost.bytes > 4 * 4 * cost.parameters
    assert cost.seconds >= 70 * cost.step_seconds > 0
    sampler = {"epsilon": 1e-5, "gamma": 1.0, "nbeta": 5.0, "num_chains": 2, "num_draws": 40, "grad_batch_size": 3}
    llc = LLCConfig.parse({**SMALL, "checkpointer_config": {"checkpoint_steps": [0, 5, 11]}, "sampler_config": sampler})
    two, four = (forecast_llc(each, place, 0.01) for each in (llc.model_copy(update={"checkpoints": 2}), llc))
    assert (two.checkpoints, four.checkpoints) == (2, 4)
    assert four.bytes == 2 * two.bytes
    assert not list(tmp_path.iterdir())


def test_an_estimate_is_measured_with_its_own_threads_and_at_steps_that_have_draws(place):
    sampler = {"epsilon": 1e-5, "gamma": 1.0, "nbeta": 5.0, "num_draws": 40, "num_burnin_steps": 30}
    config = LLCConfig.parse({**SMALL, "sampler_config": sampler})
    seen = []

    def begin(config, watch):
        seen.append((torch.get_num_threads(), config.sampler_config.num_burnin_steps, config.sampler_config.num_draws))
        for done in (1, 2):
            watch(done, 70)

    before = torch.get_num_threads()
    measured_estimate(config, begin, replace(place, threads=before + 1))
    assert seen == [(before + 1, 0, 70)]
    assert torch.get_num_threads() == before


def test_runs_share_the_jobs():
    assert wall_seconds([3, 1, 1, 1], 2) == 3
    assert wall_seconds([2, 2, 2], 1, startup_s=1) == 9
    assert wall_seconds([2, 2], 5) == 2
