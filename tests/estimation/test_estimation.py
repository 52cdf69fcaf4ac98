import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from icl.analysis.hessian import regression_loss
from icl.checkpoints import CheckpointError, Checkpoints
from icl.config import ConfigError
from icl.engine import mse_loss
from icl.estimation import LLCConfig, estimate_at_checkpoint, estimate_over_run
from icl.estimation.estimate import checkpoints_at_once, estimate_at_checkpoints, hessian_of
from icl.model import InContextRegressionTransformer, initial_parameters, unflatten
from icl.sampling import Inputs, estimate_llcs
from icl.sampling.presets import CALIBRATED
from icl.sampling.transformer_objective import TransformerObjective
from icl.storage import LocalStore
from icl.streams import Stream
from icl.subjects.regression import HeldWeights, MadeAhead, RegressionRun
from icl.tasks import RegressionTask

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
        ({"step": 7}, [7]),
        ({"step": 6, "nearest": True}, [7]),
        ({"checkpoint_idx": -1}, [59]),
        ({"steps": [0, 30, 59]}, [0, 30, 59]),
        ({"steps": [0, 28, 33, 59], "nearest": True}, [0, 30, 59]),
        ({"steps": {"linear_space": [0, 60, 3]}}, [0, 30]),
        ({"steps": {"log_space": [1, 28, 2]}}, [1, 30]),
        ({"steps": [0, 30, 59], "testing": True}, [0, 59]),
        ({"checkpoints": 3}, [0, 7, 59]),
        ({"checkpoints": 1}, [59]),
        ({"checkpoints": 9}, PRESENT),
    ],
)
def test_the_checkpoints_that_a_sweep_chooses(choice, steps):
    assert config_with(**choice).chosen_steps(PRESENT) == steps


def test_a_preset_gives_the_sampler_and_what_is_said_beside_it_comes_on_top():
    config = LLCConfig.parse({"preset": "calibrated", "sampler_config": {"num_chains": 3}})
    assert config.sampler_config == CALIBRATED.model_copy(update={"num_chains": 3})
    assert LLCConfig.parse(config.model_dump(mode="json")) == config
    assert LLCConfig.parse({"preset": "calibrated"}).name == LLCConfig(sampler_config=CALIBRATED).name
    with pytest.raises(ConfigError, match="did you mean 'calibrated'"):
        LLCConfig.parse({"preset": "calibrate"})


def test_a_choice_that_cannot_be_met_says_why():
    with pytest.raises(ConfigError, match="train it first"):
        config_with().chosen_steps([])
    with pytest.raises(ConfigError, match="the run has 5 checkpoints"):
        config_with(checkpoint_idx=5).chosen_steps(PRESENT)
    with pytest.raises(ConfigError, match="has checkpoints up to step 30 only; train it on"):
        config_with(steps=[0, 31]).chosen_steps(PRESENT[:-1])
    for choice, nearest in (({"step": 10**6}, 59), ({"steps": [0, 6, 40]}, 7)):
        with pytest.raises(ConfigError, match=rf"has no checkpoint at step .*the nearest is {nearest}:.*--nearest"):
            config_with(**choice).chosen_steps(PRESENT)
    with pytest.raises(ConfigError, match="step and checkpoint_idx both choose"):
        config_with(step=1, checkpoint_idx=1)


def test_the_hessian_metric_is_the_exact_hessian_of_the_first_sequences():
    config = config_with(sampler_config={**SAMPLER, "init_seed": 5, "num_evals": 2, "eval_metrics": ["hessian"]})
    shape = config.training.task_config.shape
    weights = dict(unflatten(shape, initial_parameters_of(config)))
    subject = RegressionRun(config.training, HeldWeights([weights]))
    row = hessian_of(config, subject, 0, subject.model(0))
    law = config.training.task_config.resolved().pretrain_task()
    xs, ys = law.sample(Stream(5, "sampling").child("dataset"), 0, 11)
    model = InContextRegressionTransformer.from_shape(shape, seed=0)
    model.load_state_dict(weights)
    hessian = torch.autograd.functional.hessian(*regression_loss(model, xs, ys))
    assert isinstance(hessian, torch.Tensor)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    by_size = eigenvalues[eigenvalues.abs().argsort(descending=True)]
    assert row["hessian/evals/0"] == pytest.approx(float(by_size[0]), rel=1e-3)
    assert row["hessian/evals/1"] == pytest.approx(float(by_size[1]), rel=1e-2)
    assert abs(row["hessian/trace"] - float(eigenvalues.sum())) < 6 * row["hessian/trace_std_error"] + 1e-6


def initial_parameters_of(config: LLCConfig) -> torch.Tensor:
    from icl.model import flatten

    return flatten(initial_parameters(config.training.task_config.shape, 7))


def test_an_estimate_that_is_cut_short_is_not_recorded(tmp_path):
    config = config_with()
    checkpoints = Checkpoints(LocalStore(tmp_path), config.training.name)
    weights = dict(unflatten(config.training.task_config.shape, initial_parameters_of(config)))
    for step in (0, 1, 7):
        checkpoints.save(step, weights)
    recorded, calls = [], []

    def count(done: int, total: int) -> None:
        calls.append((done, total))

    left = estimate_over_run(
        config,
        RegressionRun(config.training, checkpoints),
        [0],
        lambda step, weights, result: recorded.append(step),
        progress=count,
        should_stop=lambda: bool(recorded),
    )
    assert (left, recorded) == (1, [1])
    assert all(0 <= done <= total for done, total in calls)
    assert calls


def weights_of_seeds(config: LLCConfig, *seeds: int) -> list[dict[str, torch.Tensor]]:
    return [dict(initial_parameters(config.training.task_config.shape, seed)) for seed in seeds]


@pytest.fixture
def vectorised(monkeypatch):
    """Chains run as on an accelerator: as one tensor, by PyTorch."""
    monkeypatch.setattr(
        "icl.sampling.transformer_objective.TransformerObjective",
        partial(TransformerObjective, vectorise=True),
    )


@pytest.mark.parametrize(
    "choice",
    [
        {"grad_batch_origin": "eval-dataset", "eval_dataset_size": 40},
        {"num_init_loss_batches": 3},
        {"eval_method": "new-minibatch"},
        {"eval_method": "dataset", "eval_dataset_size": 30, "sampling_method": "sgnht"},
        {"eval_loss_fn": "subsequence-mse"},
    ],
    ids=lambda choice: next(iter(choice)),
)
@pytest.mark.parametrize("way", ["one by one", "as one tensor"])
def test_checkpoints_that_share_a_batch_have_the_estimates_that_they_have_alone(choice, way, request):
    if way == "as one tensor":
        request.getfixturevalue("vectorised")
    config = config_with(sampler_config={**SAMPLER, "init_seed": 5, **choice})
    weights = weights_of_seeds(config, 1, 2, 3)
    together = list(estimate_at_checkpoints(config, weights))
    assert len({result.llc_mean for result in together}) == 3
    for result, each in zip(together, weights, strict=True):
        alone = estimate_at_checkpoint(config, each)
        torch.testing.assert_close(result.token_loss_trace, alone.token_loss_trace, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.distances, alone.distances, rtol=1e-4, atol=1e-6)
        assert result.llc_mean == pytest.approx(alone.llc_mean, rel=1e-4, abs=1e-4)
        assert result.noise_heating == pytest.approx(alone.noise_heating, rel=1e-3, nan_ok=True)


@pytest.fixture
def two_at_once(monkeypatch):
    monkeypatch.setattr("icl.estimation.along_run.checkpoints_at_once", lambda config, device: 2)


def trained_run(folder, seeds: dict[int, int], **settings) -> tuple[LLCConfig, Checkpoints]:
    """A run with the initial weights of a seed at each of some steps."""
    config = config_with(**settings)
    checkpoints = Checkpoints(LocalStore(folder), config.training.name)
    for step, weights in zip(seeds, weights_of_seeds(config, *seeds.values()), strict=True):
        checkpoints.save(step, weights)
    return config, checkpoints


@pytest.mark.parametrize("memory", [None, 100_000], ids=["one group", "groups across checkpoints"])
def test_a_run_whose_checkpoints_share_batches_gives_the_same_rows(memory, tmp_path, vectorised, two_at_once):
    sampler = {**SAMPLER, "num_chains": 3, "init_seed": 5, "max_memory_bytes": memory}
    config, checkpoints = trained_run(tmp_path, {0: 1, 1: 2, 7: 3}, sampler_config=sampler)
    rows, progress = {}, []
    left = estimate_over_run(
        config, RegressionRun(config.training, checkpoints), [], lambda step, weights, result: rows.update({step: result.summary()}),
        progress=lambda done, total: progress.append(done / total),
    )  # fmt: skip
    assert left == 0
    assert list(rows) == [0, 1, 7]
    for step, row in rows.items():
        alone = estimate_at_checkpoint(config, checkpoints.load(step)).summary()
        assert row["llc/mean"] == pytest.approx(alone["llc/mean"], rel=1e-4)
    assert progress == sorted(progress)
    assert progress[-1] == 1


def test_checkpoints_before_a_damaged_one_are_recorded_and_it_is_named(tmp_path, two_at_once):
    config, checkpoints = trained_run(tmp_path, {0: 1, 1: 2, 7: 3, 30: 4})
    file = next(path for path in tmp_path.rglob("*") if path.is_file() and "7" in path.name)
    file.write_bytes(file.read_bytes()[:-9])
    recorded = []
    with pytest.raises(CheckpointError, match="7"):
        estimate_over_run(
            config,
            RegressionRun(config.training, checkpoints),
            [0],
            lambda step, weights, result: recorded.append(step),
        )
    assert recorded == [1]


def test_weights_that_are_no_minimum_of_anything_do_not_cost_the_checkpoints_before_them(tmp_path, two_at_once):
    config, checkpoints = trained_run(tmp_path, {0: 1, 1: 2})
    checkpoints.save(7, {name: torch.full_like(value, torch.inf) for name, value in checkpoints.load(1).items()})
    recorded = []
    with pytest.raises(ValueError, match="not finite"):
        estimate_over_run(
            config,
            RegressionRun(config.training, checkpoints),
            [0],
            lambda step, weights, result: recorded.append(step),
        )
    assert recorded == [1]


def test_a_stop_within_a_batch_leaves_its_checkpoints_undone(tmp_path, two_at_once):
    config, checkpoints = trained_run(tmp_path, {0: 1, 1: 2, 7: 3, 30: 4, 59: 5})
    recorded, ticks = [], []
    left = estimate_over_run(
        config, RegressionRun(config.training, checkpoints), [], lambda step, weights, result: recorded.append(step),
        progress=lambda done, total: ticks.append(done), should_stop=lambda: len(recorded) == 2 and len(ticks) > 4,
    )  # fmt: skip
    assert (left, recorded) == (3, [0, 1])


def test_models_of_another_shape_are_refused():
    config = config_with()
    models = [
        InContextRegressionTransformer.from_shape(replace(config.training.task_config.shape, num_heads=heads), seed=0)
        for heads in (1, 2)
    ]
    with pytest.raises(ValueError, match="cannot share a batch"):
        estimate_llcs(models, mse_loss, Inputs(lambda step: None), config.sampler_config)


def test_only_an_accelerator_and_settings_that_record_losses_alone_share_a_batch():
    sampler = {**SAMPLER, "init_seed": 5}
    assert checkpoints_at_once(config_with(), "cpu") == 1
    fitting = [
        checkpoints_at_once(config_with(sampler_config={**sampler, "max_memory_bytes": size}), "meta")
        for size in (1, 10**6, 10**7)
    ]
    assert fitting[0] == 1 < fitting[1] < fitting[2]
    for alone in (
        {"eval_metrics": ["weights"]},
        {"include": ["unembedding.**"]},
        {"epsilon": None},
        {"independent_batches": True},
        {"init_seed": None},
    ):
        config = config_with(sampler_config={**sampler, "max_memory_bytes": 10**7, **alone})
        assert checkpoints_at_once(config, "meta") == 1
    weighed = config_with(sampler_config={**sampler, "eval_metrics": ["weights"]})
    with pytest.raises(ValueError, match="cannot share a batch"):
        next(estimate_at_checkpoints(weighed, weights_of_seeds(weighed, 1, 2)))


MEMORY = """
import re
from pathlib import Path
import torch
from icl.model import InContextRegressionTransformer
from icl.sampling import SamplerConfig
from icl.sampling.chains import chains_that_fit
from icl.sampling import Inputs, estimate_llcs
from icl.sampling.transformer_objective import TransformerObjective
from icl.streams import Stream
from icl.tasks import RegressionTask
torch.set_num_threads(1)
bound, size = 400 * 2**20, 128

def peak():  # of this process; ru_maxrss is handed down by the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

objective = TransformerObjective(InContextRegressionTransformer(4, 8, 64, 64, 4, 2, seed=0), vectorise=True)
batch = RegressionTask(4, 8, 0.125).sample(Stream(0, "memory"), 0, size)
chains = chains_that_fit(SamplerConfig(max_memory_bytes=bound), objective, batch)
objective.losses_and_gradients(objective.anchor.expand(1, -1).clone(), batch)
before = peak()
objective.losses_and_gradients(objective.anchor.expand(chains, -1).clone(), batch)
print(chains, (peak() - before) / bound)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_chains_of_one_group_take_no_more_memory_than_the_bound():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    chains, share = done.stdout.split()
    assert int(chains) > 2
    assert 0.2 < float(share) < 1.0


def test_batches_made_ahead_are_those_made_one_by_one():
    law, stream = RegressionTask(3, 4, 0.5, num_tasks=7), Stream(3, "ahead")
    ahead = MadeAhead(law, stream, 5, torch.device("cpu"))
    for step in (0, 1, 999, 1000, 2500, 3):
        assert all(torch.equal(*pair) for pair in zip(ahead(step), law.sample(stream, step, 5), strict=True))
