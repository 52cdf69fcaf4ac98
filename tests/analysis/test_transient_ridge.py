import numpy as np
import pandas as pd
import pytest
import torch

from icl.analysis.transient_ridge import (
    checkpoint_distances,
    critical_steps,
    crossover_samples,
    joint_trajectory_pca,
    reference_coordinates,
)
from icl.baselines import dmmse_predictor, ridge_predictor

GENERATOR = torch.Generator().manual_seed(0)
TASKS = torch.randn(7, 3, generator=GENERATOR)
XS = torch.randn(11, 5, 3, generator=GENERATOR)
YS = (XS @ TASKS[0])[..., None] + 0.5 * torch.randn(11, 5, 1, generator=GENERATOR)
INFINITY = float("inf")


def test_one_pca_of_all_models_together():
    rng = np.random.default_rng(0)
    trajectories = {2.0: ([0, 5, 9], rng.normal(size=(3, 55))), INFINITY: ([0, 7], rng.normal(size=(2, 55)))}
    fitted, table = joint_trajectory_pca(trajectories)
    stacked = np.concatenate([rows for _, rows in trajectories.values()])
    u, s, _ = np.linalg.svd(stacked - stacked.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(table[["pc/0", "pc/1"]]), np.abs(u * s)[:, :2], atol=1e-9)
    assert table["num_tasks"].tolist() == [2, 2, 2, INFINITY, INFINITY]
    assert table["step"].tolist() == [0, 5, 9, 0, 7]
    np.testing.assert_allclose(fitted.explained_variance_ratio, (s**2 / (s**2).sum())[:2])


def test_a_model_that_is_an_optimal_predictor_lies_on_it():
    def flat(predictions):
        return predictions.reshape(-1).numpy()

    ridge = flat(ridge_predictor(XS, YS, 0.25))
    dmmse = {m: flat(dmmse_predictor(XS, YS, TASKS[:m], 0.25)) for m in (2, 7)}
    start = np.zeros_like(ridge)
    trajectories = {float(m): ([0, 1, 2], np.stack((start, ridge, end))) for m, end in dmmse.items()}
    fitted, table = joint_trajectory_pca(trajectories, 3)
    references = reference_coordinates(fitted, XS, YS, TASKS, [2, 7], 0.25).set_index(["predictor", "num_tasks"])
    names = [f"pc/{i}" for i in range(3)]
    ours = table.set_index(["num_tasks", "step"])[names]
    np.testing.assert_allclose(references.loc[("ridge", INFINITY), names], ours.loc[(2, 1)], atol=1e-5)
    np.testing.assert_allclose(references.loc[("dmmse", 2), names], ours.loc[(2, 2)], atol=1e-5)
    np.testing.assert_allclose(references.loc[("dmmse", 7), names], ours.loc[(7, 2)], atol=1e-5)


def test_distances_vanish_for_the_predictor_itself():
    ood = torch.randn(11, 5, 3, generator=GENERATOR), torch.zeros(11, 5, 1)

    def ridge(xs, ys):
        return ridge_predictor(xs, ys, 0.25)

    row = checkpoint_distances(ridge, (XS, YS), ood, TASKS[:2], 0.25).iloc[0]
    assert row["delta_ridge"] == 0
    gap = float((ridge(XS, YS) - dmmse_predictor(XS, YS, TASKS[:2], 0.25)).square().mean())
    assert row["delta_dmmse"] == pytest.approx(gap)
    assert row["in_distribution/mse"] == pytest.approx(float((ridge(XS, YS) - YS).square().mean()))
    assert row["ood/mse"] == 0  # ridge of labels that are all zero
    own = checkpoint_distances(lambda xs, ys: dmmse_predictor(xs, ys, TASKS[:2], 0.25), (XS, YS), ood, TASKS[:2], 0.25)
    assert own["delta_dmmse"].item() == 0
    assert np.isnan(checkpoint_distances(ridge, (XS, YS), ood, None, 0.25)["delta_dmmse"].item())


def test_critical_step_is_the_dip_of_the_loss():
    steps = np.arange(1, 8) * 100
    transient, lasting = (steps - 300.0) ** 2 / 1e4 + 2, 8 - steps / 100
    table = pd.concat(
        [
            pd.DataFrame({"num_tasks": INFINITY, "step": steps, "ood/mse": lasting, "delta_ridge": 1.0}),
            pd.DataFrame({"num_tasks": 16, "step": steps, "ood/mse": transient, "delta_ridge": steps / 100}),
        ]
    ).sample(frac=1, random_state=0)
    found = critical_steps(table)
    assert found["num_tasks"].tolist() == [16, INFINITY]
    assert found["t_crit"].tolist() == [300, 700]
    assert found["delta_ridge"].tolist() == [3, 1]
    assert found["final_ratio"].tolist() == [18 / 2, 1]


def test_crossover_balances_the_free_energies():
    n = crossover_samples(-0.02, 30)
    assert -0.02 * n + 30 * np.log(n) == pytest.approx(0, abs=1e-9 * n)
    # Beyond it the loss wins, before it the complexity.
    assert -0.02 * 2 * n + 30 * np.log(2 * n) < 0 < -0.02 * n / 2 + 30 * np.log(n / 2)


@pytest.mark.parametrize(
    ("delta_loss", "delta_llc", "samples"),
    [
        (-1.0, 2.0, 0.0),
        (-1.0, 0.0, 0.0),
        (-1.0, -3.0, 0.0),
        (0.0, -5.0, 0.0),
        (0.0, 5.0, INFINITY),
        (1.0, 0.0, INFINITY),
    ],
)
def test_one_solution_may_always_win(delta_loss, delta_llc, samples):
    assert crossover_samples(delta_loss, delta_llc) == samples


def test_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="exchange"):
        crossover_samples(1, -1)
    with pytest.raises(ValueError, match="finite"):
        crossover_samples(float("nan"), 1)
    with pytest.raises(ValueError, match="at least one"):
        joint_trajectory_pca({})
    with pytest.raises(ValueError, match="steps"):
        joint_trajectory_pca({1.0: ([0], np.ones((2, 3)))})
    with pytest.raises(ValueError, match="same sequences"):
        joint_trajectory_pca({1.0: ([0], np.ones((1, 3))), 2.0: ([0], np.ones((1, 4)))})
