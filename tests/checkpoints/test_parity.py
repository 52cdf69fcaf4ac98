"""Numbers of the reference code (public code of arXiv 2402.02364) for random weights and inputs: model, ridge and
dMMSE within 1e-5."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from icl.baselines import dmmse_predictor, ridge_predictor
from icl.checkpoints import load_reference_state_dict
from icl.model import InContextRegressionTransformer

NOISE_VARIANCE = 0.125


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "fixtures" / "parity.npz") as archive:
        return dict(archive)


def largest_difference(ours: Tensor, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach() - torch.from_numpy(theirs)).abs().max())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_model(reference, index):
    prefix = f"model{index}"
    model = InContextRegressionTransformer(**json.loads(bytes(reference[f"{prefix}/config"])), seed=0)
    start = f"{prefix}/state/"
    state = {
        name.removeprefix(start): torch.from_numpy(value) for name, value in reference.items() if name.startswith(start)
    }
    load_reference_state_dict(model, state)
    xs, ys = torch.from_numpy(reference[f"{prefix}/xs"]), torch.from_numpy(reference[f"{prefix}/ys"])
    assert largest_difference(model(xs, ys), reference[f"{prefix}/pred"]) < 1e-5
    full, _ = model(xs, ys, activations=())
    assert largest_difference(full, reference[f"{prefix}/pred"]) < 1e-5


def test_baselines(reference):
    xs, ys = torch.from_numpy(reference["baseline/xs"]), torch.from_numpy(reference["baseline/ys"])
    tasks = torch.from_numpy(reference["dmmse/tasks"])
    assert largest_difference(ridge_predictor(xs, ys, NOISE_VARIANCE), reference["ridge/pred"]) < 1e-5
    assert largest_difference(dmmse_predictor(xs, ys, tasks, NOISE_VARIANCE), reference["dmmse/pred"]) < 1e-5
