"""Every sweep file of the repository, and the reference code's own, expand to valid configurations."""

import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from icl.config import Training, expand_steps
from icl.config.kinds import parse_training
from icl.config.sweeps import expand, load_sweep
from icl.estimation import LLCConfig
from icl.model import InContextRegressionTransformer, TransformerShape, parameter_layout
from icl.sampling.restriction import restrict

pytestmark = pytest.mark.xdist_group("sweep-files")  # each file is expanded once

SWEEPS = Path(__file__).parents[2] / "sweeps"
FILES = sorted(SWEEPS.rglob("*.yaml"))
PARSE = {"train": parse_training, "llc": LLCConfig.parse}
CALIBRATED_STEPS = [507, 1124, 3247, 9375, 27072, 59968, 121212, 499999]
# The number of runs of each file, from the definition of its grid.
RUNS = {
    "training-runs/L2H4Minf": 5 * 2,
    "training-runs/L2H4Minf-K16": 11,
    "training-runs/L2H4Minf-dense": 2,
    "training-runs/L2H4Mfin": 21,
    "training-runs/L2H4Mfin-K8": 11,
    "training-runs/transient-ridge": 31,
    "training-runs/quick": 2,
    "training-runs/language-quick": 3,
    "analysis/0-L2H4-llcs-over-time": 5,
    "analysis/0-L2H4-llcs-over-time-K16": 10,
    "analysis/1-L2H4-llcs-over-time-no-seed": 1,
    "analysis/2-L2H4-rllcs-inclusions": 22,
    "analysis/2-L2H4-rllcs-exclusions": 21,
    "analysis/3-L2H4-hessian": 5,
    "analysis/4-L2H4-shipped-llcs": 1,
    "analysis/5-L2H4-late-llcs": 1,
    "analysis/6-L2H4-stage-end-llcs": 4,
    "analysis/7-L2H4-long-llcs": 1,
    "analysis/8-L2H4-relative-llcs": 5,
    "analysis/9-L2H4-gamma-spectrum": 5,
    "analysis/11-L2H4Mfin-llcs": 11,
    "analysis/12-L2H4Mfin-relative-llcs": 11,
    "analysis/10-L2H4-restricted-llcs": 19,
    "analysis/10-L2H4-restricted-llcs-calibrated": 19,
    "analysis/10-L2H4-restricted-llcs-relative": 19,
    "analysis/10-L2H4-complement-llcs-calibrated": 7,
    "analysis/13-L2H4-K16-llcs-calibrated": 2,
    "analysis/14-L2H4-table-gamma-llcs": 5,
    "analysis/15-L2H4-dense-llcs-calibrated": 1,
    "analysis/L2H4-llcs-calibrated": 1,
    "analysis/quick-llc": 2,
    "analysis/language-llcs": 2,
    "analysis/language-llcs-local": 2,
    "analysis/language-quick-llcs": 1,
    "calibration/0-L2H4-eps-temp-gamma": 6**3 * 8,
    "calibration/1-L2H4-eval-dataset-size": 11 * 8,
    "calibration/2-L2H4-eval-fixed-batch": 5 * 8,
    "calibration/3-L2H4-eval-minibatch": 6 * 2 * 8,
    "calibration/4-L2H4-eval-loss-fn": 2 * 8,
    "calibration/5-L2H4-highlights": 2 * 8,
    "calibration/6-L2H4-non-minima": 5,
    "calibration/7-L2H4-non-exploration": 5,
}


def name_of(path: Path) -> str:
    return path.relative_to(SWEEPS).with_suffix("").as_posix()


def command_of(path: Path) -> str:
    environment, program, command = load_sweep(path).command
    assert (environment, program) == ("${env}", "icl")
    return command


@cache
def points_of(name: str) -> list:
    return expand(load_sweep(SWEEPS / f"{name}.yaml"))


@cache
def configs_of(name: str, every: int | None = None) -> list:
    """The configurations of a file's points: of all, or of every n-th; None: of a hundred or two of a large grid, spread over it."""
    points, parse = points_of(name), PARSE[command_of(SWEEPS / f"{name}.yaml")]
    return [parse(config) for config in points[:: every or max(1, len(points) // 150)]]


@pytest.fixture(scope="module")
def trained() -> dict[str, Training]:
    """All training runs of the repository by name; of equal runs the one with the most checkpoints."""
    runs: dict[str, Training] = {}
    for name in RUNS:
        if name.startswith("training-runs"):
            for config in configs_of(name):
                known = runs.get(config.name)
                if known is None or len(config.checkpoint_steps()) > len(known.checkpoint_steps()):
                    runs[config.name] = config
    return runs


def test_the_table_of_this_test_is_complete():
    assert {name_of(path) for path in FILES} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_every_point_is_a_valid_run_of_its_own(name):
    configs = configs_of(name)
    names = {config.name for config in configs}
    assert len(configs) == len(names)
    assert len(points_of(name)) == RUNS[name]


@pytest.mark.slow
def test_every_point_of_the_largest_grid_is_a_valid_run_of_its_own():
    name = max(RUNS, key=lambda name: RUNS[name])
    assert len({config.name for config in configs_of(name, every=1)}) == RUNS[name]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is_for_what_it_costs_and_what_was_run(path):
    lines = path.read_text().splitlines()
    header = [line for line in lines[: lines.index("")] if line.startswith("#")]
    assert len(header) == lines.index("")
    said = " ".join(line.removeprefix("# ") for line in header)
    assert re.search(r"Cost: .*core (minutes|hours)", said)
    assert re.search(r"\bRun (thinned )?(on|from) 20\d\d-|\bRun thinned, as|\b[Nn]ot run\b", said), "what was run?"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith(("training-runs", "analysis/language"))])
def test_every_estimate_has_its_training_run_and_its_checkpoints(name, trained):
    configs = configs_of(name)
    first = configs[0]
    wanted = {config.step for config in configs} if first.steps is None else set(expand_steps(first.steps, 500_000))
    for run in {config.training.name for config in configs}:
        present = np.array(trained[run].checkpoint_steps())
        # A grid that the training run does not share is met within half its spacing of checkpoints, 50 steps.
        assert all(np.abs(present - step).min() <= 25 for step in wanted)


@pytest.mark.parametrize(
    ("name", "count"), [("L2H4Minf", 51_717), ("L2H4Minf-K16", 52_741), ("transient-ridge", 2_654_217)]
)
def test_parameter_counts_are_the_published_ones(name, count):
    (config, *_) = configs_of(f"training-runs/{name}")
    layout = parameter_layout(config.task_config.shape)
    assert sum(math.prod(size) for _, size in layout.values()) == count


def test_grids_reach_the_published_numbers_of_checkpoints():
    reached = {
        name: len(configs_of(f"training-runs/{name}")[0].checkpoint_steps()) for name in ("L2H4Minf", "L2H4Mfin")
    }
    assert reached == {"L2H4Minf": 190, "L2H4Mfin": 10_089}
    assert len(configs_of("training-runs/L2H4Minf-dense")[0].checkpoint_steps()) == 50_078


def test_the_published_constants():
    for name in ("analysis/0-L2H4-llcs-over-time", "calibration/1-L2H4-eval-dataset-size"):
        for config in configs_of(name):
            sampler = config.sampler_config
            assert sampler.step_size == pytest.approx(3e-4)
            assert sampler.localization == pytest.approx(20 / 3)
            assert sampler.inverse_temperature == pytest.approx(200 / 3)


@cache
def sampled(shape: TransformerShape, include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> frozenset[str]:
    """The parameters that these patterns choose."""
    return frozenset(restrict(InContextRegressionTransformer.from_shape(shape, seed=0), include, exclude).masks)


def test_restricted_groups_and_their_complements_share_no_parameter():
    shape = configs_of("analysis/2-L2H4-rllcs-inclusions")[0].training.task_config.shape
    inside = {config.sampler_config.include: config for config in configs_of("analysis/2-L2H4-rllcs-inclusions")}
    for config in configs_of("analysis/2-L2H4-rllcs-exclusions"):
        group = config.sampler_config.exclude
        chosen = sampled(shape, inside[group].sampler_config.include)
        rest = sampled(shape, ("**",), group)
        assert chosen.isdisjoint(rest)
        assert chosen | rest == set(parameter_layout(shape))


# The reference code's own sweep files: their keys and values, with the command alone changed.

SEEDS = {"pretrain_seed": None, "true_seed": None, "sampling_seed": None}
MODEL = {"task_size": 4, "noise_variance": 0.125, "embed_size": 64, "mlp_size": 64, "num_heads": 4, "num_layers": 2}
DIVERSITY = [2**power for power in range(21)]
PREFIX = "token_sequence_transformer."
OLD_SEEDS = {"pretrain_seed": 1, "true_seed": 2, "sampling_seed": 3}


def task(examples, tasks, seeds=SEEDS, **others):
    return {
        **MODEL,
        "max_examples": examples,
        "num_tasks": tasks,
        **seeds,
        "layer_norm": True,
        "include_output": True,
    } | others


def grid(log, linear):
    return {"checkpoint_steps": {"log_space": log, "linear_space": linear}}


def sampler(**others):
    published = {"gradient_scale": 0.01, "localization_scale": 0.001, "noise_scale": 0.0003}
    return {
        **{"num_chains": 8, "num_draws": 2000, "sampling_method": "sgld", "grad_batch_origin": "eval-dataset"},
        **{"grad_batch_size": 1024, **published, "eval_method": "grad-minibatch", "eval_batch_size": None},
        **{"eval_dataset_size": 1048576, "eval_metrics": ["likelihood-derived", "batch-loss", "weights"]},
        **{"eval_online": True, "eval_loss_fn": "mse", **others},
    }


LR = {"optimizer_config": {"lr": 0.003}}
PLOTS = {"plotting_config": {"include_loss_trace": True, "include_weights_pca": True}}
PLAIN = ["likelihood-derived", "batch-loss"]
GROUPS = [
    [f"{PREFIX}token_embedding.weight"],
    [f"{PREFIX}token_embedding.weight", f"{PREFIX}postn_embedding.weight", f"{PREFIX}unembedding.**"],
    [f"{PREFIX}unembedding.0.*"],
    [f"{PREFIX}unembedding.1.*"],
    [f"{PREFIX}blocks.0.layer_norms.1.*"],
    [f"{PREFIX}blocks.*.layer_norms.**", f"{PREFIX}unembedding.0.*"],
    [f"{PREFIX}blocks.0.compute.**"],
    [f"{PREFIX}blocks.*.attention.**"],
    [f"{PREFIX}blocks.1.**"],
]


class Varied(list):
    """The `values` of a parameter."""


def training(task_config, checkpoints):
    return {"task_config": task_config, "checkpointer_config": checkpoints, **LR, "eval_batch_size": 1024}


def estimate(sampler_config, task_config, **others):
    return {"sampler_config": sampler_config, "task_config": task_config, **LR, **others}


ZERO, FIVE = Varied([0]), Varied(range(5))
RESTRICTED = sampler(
    num_draws=100,
    num_burnin_steps=0,
    grad_batch_origin="infinite-dataset",
    eval_dataset_size=131072,
    eval_metrics=PLAIN,
    eval_online=False,
    init_seed=42,
)
SUBSAMPLED = {"log_space": 100, "linear_space": 10000, "linear_subsample": 50}
AT = {"step": Varied(CALIBRATED_STEPS)}
REFERENCE = {
    "L2H4Minf (K=8)": (training(task(8, "inf", model_seed=FIVE, layer_norm=Varied([True, False])), grid(100, 100)), 10),
    "L2H4Minf (many checkpoints)": (training(task(16, "inf", model_seed=Varied(range(11))), grid(100, 10_000)), 11),
    "L2H4Mfin": (training(task(16, Varied(DIVERSITY), model_seed=0), grid(100, 10_000)), 21),
    "L2H4Minf-1": (training(task(8, "inf", model_seed=1), grid(0, 50_000)), 1),
    "L8H2Minf": (
        training(
            task(
                16, "inf", model_seed=Varied(range(21)), task_size=8, noise_variance=0.25, embed_size=128, mlp_size=128
            )
            | {"num_heads": 2, "num_layers": 8},
            grid(100, 10_000),
        ),
        21,
    ),
    "0-llcs-over-time": (
        estimate(
            sampler(num_draws=500, num_burn_in=500, gradient_scale=0.03, localization_scale=0.003, noise_scale=0.001)
            | {"eval_dataset_size": 32768, "eval_metrics": PLAIN, "eval_online": False, "init_seed": 0},
            task(16, "inf", model_seed=Varied(range(10))),
            eval_batch_size=1024,
            steps={"log_space": 100, "linear_space": 200},
        ),
        10,
    ),
    "0-llcs-over-time (published)": (
        estimate(
            sampler(
                num_chains=10, num_draws=5000, num_burn_in=1000, eval_metrics=PLAIN, eval_online=False, init_seed=0
            ),
            task(8, "inf", model_seed=FIVE),
            eval_batch_size=1024,
        ),
        5,
    ),
    "test-llcs-over-time": (
        estimate(
            sampler(
                num_chains=25, num_draws=1000, gradient_scale=0.001, localization_scale=0.00015, eval_batch_size=1024
            )
            | {"eval_metrics": ["likelihood-derived", "hessian"], "per_token": True, "num_init_loss_batches": 16},
            task(8, Varied([1, 2, 32, 64, 1048576]), OLD_SEEDS, model_seed=0),
            eval_batch_size=1024,
        ),
        5,
    ),
    "1-rllcs-inclusions": (
        estimate(RESTRICTED | {"include": Varied([["*"], *GROUPS])}, task(16, "inf", model_seed=0), testing=False)
        | {"steps": SUBSAMPLED, "eval_batch_size": 1024},
        1 + len(GROUPS),
    ),
    "1-rllcs-exclusions": (
        estimate(RESTRICTED | {"exclude": Varied(GROUPS)}, task(16, "inf", model_seed=0), testing=False)
        | {"steps": SUBSAMPLED, "eval_batch_size": 1024},
        len(GROUPS),
    ),
    "0-eps-temp-gamma": (
        estimate(
            sampler(num_chains=10, num_draws=1000, eval_metrics=PLAIN, init_seed=0)
            | {
                "gradient_scale": Varied([1e-5, 1e-2]),
                "localization_scale": Varied([1e-5, 1e-3]),
                "noise_scale": Varied([3e-4]),
            },
            task(8, "inf", model_seed=ZERO, layer_norm=Varied([True, False])),
            **PLOTS,
            step=Varied([10101, 499999]),
        ),
        16,
    ),
    "1-eval-dataset-size": (
        estimate(
            sampler(eval_dataset_size=Varied([2**power for power in range(10, 21)]), init_seed=0),
            task(8, "inf", model_seed=ZERO),
            **PLOTS,
            **AT,
        ),
        88,
    ),
    "2-eval-fixed-batch": (
        estimate(
            sampler(eval_method="fixed-minibatch", eval_batch_size=Varied([1024, 2048, 4096, 8192, 16384])),
            task(8, "inf", model_seed=ZERO),
            plotting_config={**PLOTS["plotting_config"], "num_components": 3, "num_points": 10},
            **AT,
        ),
        40,
    ),
    "3-eval-minibatch": (
        estimate(
            sampler(
                eval_method=Varied(["grad-minibatch", "new-minibatch"]),
                grad_batch_size=Varied([256, 512, 1024, 2048, 4096, 8192]),
            ),
            task(8, "inf", model_seed=ZERO),
            **PLOTS,
            **AT,
        ),
        96,
    ),
    "4-eval-loss-fn": (
        estimate(
            sampler(eval_batch_size=1024, eval_loss_fn=Varied(["subsequence-mse", "mse"])),
            task(8, "inf", model_seed=ZERO),
            **PLOTS,
            **AT,
        ),
        16,
    ),
    "5-highlights": (
        estimate(
            sampler(num_chains=10, num_draws=5000, init_seed=0),
            task(8, "inf", model_seed=Varied([0, 1])),
            **PLOTS,
            **AT,
        ),
        16,
    ),
    "6-non-minima": (
        estimate(
            sampler(localization_scale=0.0, noise_scale=0.00001, init_seed=0), task(8, "inf", model_seed=FIVE), **PLOTS
        )
        | {"step": ZERO},
        5,
    ),
    "7-non-exploration": (
        estimate(sampler(noise_scale=0.00000001, init_seed=0), task(8, "inf", model_seed=FIVE), **PLOTS)
        | {"step": Varied([499999])},
        5,
    ),
}


def as_parameters(settings: dict) -> dict:
    """W&B's tree of a nested dictionary."""
    tree = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            tree[key] = {"parameters": as_parameters(value)}
        else:
            tree[key] = {"values": list(value)} if isinstance(value, Varied) else {"value": value}
    return tree


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_codes_sweeps_run_with_only_their_command_changed(name, tmp_path):
    settings, runs = REFERENCE[name]
    command = "llc" if "sampler_config" in settings else "train"
    words = ["${env}", "icl", command]
    sweep = {"name": name, "method": "grid", "command": words, "project": "icl", "parameters": as_parameters(settings)}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    configs = [PARSE[command](config) for config in expand(load_sweep(path))]
    assert len(configs) == runs
    for config in configs:
        if isinstance(config, LLCConfig):
            sampler = config.sampler_config
            assert sampled(config.training.task_config.shape, sampler.include, sampler.exclude)
