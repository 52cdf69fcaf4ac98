"""Every metric and every way of evaluating that a sweep file may ask for, through `run_llc` as the command line runs it."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from icl.checkpoints import Checkpoints
from icl.engine import mse_loss
from icl.estimation import LLCConfig, estimate_at_checkpoint
from icl.estimation.record import weight_scores
from icl.estimation.traces import read_estimates
from icl.execution.llc_run import run_llc
from icl.execution.surroundings import Surroundings
from icl.model import InContextRegressionTransformer, flatten, initial_parameters, unflatten
from icl.sampling import estimate_llc
from icl.sampling.objective import ModuleObjective
from icl.storage import LocalStore
from icl.subjects.regression import sampling_batches
from icl.tracking import read_metrics

TASK = {
    **{"task_size": 2, "max_examples": 3, "embed_size": 8, "mlp_size": 5, "num_heads": 2, "num_layers": 2},
    **{"num_tasks": "inf", "model_seed": 7, "pretrain_seed": None, "true_seed": None, "sampling_seed": None},
}
SAMPLER = {
    **{"epsilon": 1e-4, "gamma": 1.0, "nbeta": 10.0, "num_chains": 3, "num_draws": 11, "grad_batch_size": 13},
    **{"eval_dataset_size": 53, "init_seed": 5},
}
METHODS = ["grad-minibatch", "new-minibatch", "fixed-minibatch", "dataset"]


def config_with(sampler=(), **others) -> LLCConfig:
    data = {"task_config": TASK, "sampler_config": {**SAMPLER, **dict(sampler)}, "num_steps": 60, "step": 7}
    return LLCConfig.parse({**data, **others})


def weights_of(config: LLCConfig) -> dict[str, torch.Tensor]:
    shape = config.training.task_config.shape
    return {name: value.clone() for name, value in unflatten(shape, flatten(initial_parameters(shape, 7))).items()}


def run(folder: Path, config: LLCConfig) -> Path:
    """Run it against a store that holds its one checkpoint; returns the results folder."""
    store = LocalStore(folder)
    Checkpoints(store, config.training.name).save(7, weights_of(config))
    place = Surroundings(store, folder / "icl", torch.device("cpu"), tracking="local")
    assert run_llc(config, place) == 0
    return place.results / config.name


@pytest.mark.parametrize("origin", ["infinite-dataset", "eval-dataset"])
@pytest.mark.parametrize("method", METHODS)
def test_every_evaluation_runs_and_is_the_loss_of_the_data_it_names(method, origin):
    config = config_with({"eval_method": method, "grad_batch_origin": origin})
    if method == "new-minibatch":
        config = config_with({"eval_method": method, "grad_batch_origin": origin, "eval_batch_size": 17})
    seen = []
    sampler = config.sampler_config
    batches, held = sampling_batches(config.training.task_config.resolved().pretrain_task(), sampler, 5)
    model = InContextRegressionTransformer.from_weights(config.training.task_config.shape, weights_of(config))
    estimate_llc(
        model, mse_loss, batches, sampler, eval_batches=held, recorders=[lambda draw, w, chains: seen.append(w.clone())]
    )
    result = estimate_at_checkpoint(config, weights_of(config))
    objective = ModuleObjective(model, mse_loss)
    for draw, weights in enumerate(seen):
        match method:
            case "grad-minibatch":
                data = [batches(draw)]
            case "new-minibatch":
                data = [held(draw)] if callable(held) else held  # one of the set
                assert {len(xs) for xs, _ in data} <= {17, 53 % 17}
            case "fixed-minibatch":
                data = [held[0]]
            case _:
                data = [tuple(torch.cat(parts) for parts in zip(*held, strict=True))]
                assert len(data[0][0]) == 53
        expected = [objective.losses(weights, each).mean(dim=1).double() for each in data]
        assert any(torch.allclose(result.loss_trace[:, draw], each, rtol=1e-5, atol=1e-6) for each in expected)


def test_every_metric_of_the_reference_reaches_the_results_folder(tmp_path):
    metrics = ["likelihood-derived", "singular-fluctuation", "batch-loss", "weights", "covariance", "hessian"]
    config = config_with(
        {"eval_metrics": metrics, "eval_online": True, "eval_method": "fixed-minibatch", "num_evals": 2},
        plotting_config={"include_loss_trace": True, "include_weights_pca": True, "num_points": 4},
    )
    folder = run(tmp_path, config)
    (row,) = read_metrics(folder)
    assert {"llc/mean", "wbic/mean", "loss/init", "hessian/evals/1", "batch-loss/chain-2/std"} <= set(row)
    assert row["singular_fluctuation"] > 0
    traces = pd.read_csv(folder / "tables" / "traces-7.csv.gz")
    assert len(traces) == 3 * 11
    last = traces[traces["draw"] == 10]["llc"]
    assert float(last.mean()) == pytest.approx(row["llc/mean"], rel=1e-5)
    losses = [row[f"batch-loss/chain-{chain}/mean"] for chain in range(3)]
    assert row["batch-loss/mean"] == pytest.approx(sum(losses) / 3)
    assert row["batch-loss/mean"] != row["loss/mean"], "the loss is taken on the fixed batch"
    covariance = pd.read_csv(folder / "tables" / "covariance-7.csv.gz")
    assert {"embed/token", "block_0/head_1", "block_1/mlp_1", "unembed/linear"} <= set(covariance["left"])
    scores = pd.read_csv(folder / "tables" / "weights-7.csv.gz")
    assert {"chain", "draw", "pc/2", "explained/2"} <= set(scores)
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["loss-trace-7.png", "weights-pca-7.png"]


def test_a_figure_of_the_weights_brings_the_trace_it_needs_but_no_table(tmp_path):
    folder = run(tmp_path, config_with(plotting_config={"include_weights_pca": True, "num_points": 3}))
    assert [path.name for path in (folder / "images").iterdir()] == ["weights-pca-7.png"]
    assert not (folder / "tables").exists()


def test_principal_coordinates_are_those_of_the_displacements_from_the_checkpoint():
    config = config_with({"eval_metrics": ["weights"]})
    trace = estimate_at_checkpoint(config, weights_of(config)).weights
    shares, components, scores = weight_scores(trace, 3)
    deltas = trace.deltas.numpy()
    expected = deltas.reshape(-1, deltas.shape[-1]) @ components.T
    np.testing.assert_allclose(scores[["pc/0", "pc/1", "pc/2"]].to_numpy(), expected, atol=1e-6)
    # Shares against the eigenvalues of the covariance matrix itself.
    values = np.linalg.eigvalsh(np.cov(deltas.reshape(-1, deltas.shape[-1]).T.astype(float)))[::-1]
    np.testing.assert_allclose(shares, values[:3] / values.sum(), rtol=1e-4)


def test_covariances_of_a_restricted_chain_are_those_of_its_own_weights(tmp_path):
    config = config_with({"eval_metrics": ["covariance"], "include": ["blocks.1.mlp.**"], "num_evals": 2})
    table = pd.read_csv(run(tmp_path, config) / "tables" / "covariance-7.csv.gz")
    assert set(table["left"]) == {"block_1/mlp_0", "block_1/mlp_1"}
    trace = estimate_at_checkpoint(config, weights_of(config)).weights.deltas.double()
    up = trace.flatten(0, 1)[:, : 8 * 5]  # the weight of the first map comes first, then its bias
    covariance = torch.cov(up.T, correction=0)
    largest = float(torch.linalg.eigvalsh(covariance)[-1])
    own = table[(table["left"] == "block_1/mlp_0") & (table["right"] == "block_1/mlp_0") & (table["index"] == 0)]
    assert float(own["value"].iloc[0]) == pytest.approx(largest, rel=1e-4)


def test_the_singular_fluctuation_of_the_transformer_is_that_of_its_sequences():
    config = config_with({"eval_metrics": ["singular-fluctuation"], "eval_method": "fixed-minibatch"})
    seen = []
    batches, held = sampling_batches(config.training.task_config.resolved().pretrain_task(), config.sampler_config, 5)
    model = InContextRegressionTransformer.from_weights(config.training.task_config.shape, weights_of(config))
    result = estimate_llc(
        model, mse_loss, batches, config.sampler_config, eval_batches=held,
        recorders=[lambda draw, w, chains: seen.append(w.clone())],
    )  # fmt: skip

    def per_sequence(predict, batch):
        return (predict(*batch) - batch[1]).square().mean(dim=(1, 2))

    losses = torch.stack([ModuleObjective(model, per_sequence).losses(w, held[0]) for w in seen]).double()
    expected = 10.0 / 2 * float(losses.var(dim=0).mean())
    assert result.singular_fluctuation == pytest.approx(expected, rel=1e-4)


def test_a_repeated_run_leaves_the_same_bytes(tmp_path):
    config = config_with({"eval_online": True, "eval_metrics": ["likelihood-derived", "batch-loss"]})
    first, again = run(tmp_path / "a", config), run(tmp_path / "b", config)
    for name in ("metrics.jsonl", "tables/traces-7.csv.gz"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert not any(
        math.isnan(value)
        for value in json.loads((first / "metrics.jsonl").read_text()).values()
        if isinstance(value, float)
    )


def test_an_estimate_all_of_whose_chains_diverge_is_recorded_without_tables_of_their_weights(tmp_path):
    config = config_with(
        {"epsilon": 1e9, "eval_metrics": ["likelihood-derived", "weights", "covariance"], "num_evals": 2},
        plotting_config={"include_weights_pca": True, "num_points": 4},
    )
    folder = run(tmp_path, config)
    (row,) = read_metrics(folder)
    assert row["chains/lost"] == 3
    assert not list(folder.glob("tables/weights*"))
    assert not list(folder.glob("tables/covariance*"))


def test_an_estimate_whose_table_did_not_arrive_is_made_again(tmp_path):
    config = config_with({"eval_metrics": ["likelihood-derived", "weights"], "eval_online": True})
    folder = run(tmp_path, config)
    tables = {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
    row = read_estimates(folder)
    assert sorted(tables) == ["traces-7.csv.gz", "weights-7.csv.gz"]
    (folder / "tables" / "weights-7.csv.gz").unlink()
    run(tmp_path, config)
    assert sorted(path.name for path in (folder / "tables").iterdir()) == sorted(tables)
    assert [each["llc/mean"] for each in read_estimates(folder)] == [each["llc/mean"] for each in row]
