"""Transient ridge: models trained on few tasks first approach ridge regression and later leave it for dMMSE (arXiv 2501.17745).

Each model is trained on the first M tasks of one list. All models are compared on the same sequences, which are drawn from the
first task. Their predictions at all checkpoints form one matrix, and its PCA is the joint trajectory PCA. The optimal
predictors are projected onto it afterwards; they take no part in the fit.

Shapes: N checkpoints of all models, B batch, K examples, D task dimension, M tasks, V components.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import lambertw
from torch import Tensor

from icl.analysis.data import AnalysisData, FamilyRun
from icl.analysis.essential_dynamics import TrajectoryPCA, pca
from icl.analysis.trajectories import output_row
from icl.baselines import Predictor, dmmse_predictor, ridge_predictor
from icl.model import InContextRegressionTransformer

NUM_COMPONENTS = 4
"""The number of components of the joint trajectory PCA. The paper shows 2 and 4."""

Array = NDArray[np.float64]


def joint_trajectory_pca(
    trajectories: Mapping[float, tuple[Sequence[int], ArrayLike]], num_components: int = 2
) -> tuple[TrajectoryPCA, pd.DataFrame]:
    """One PCA of several models' trajectories of predictions.

    Args:
        trajectories: M (infinity for Gaussian tasks) -> steps (N_M,) and predictions (N_M, B·K) on the same sequences for all.
        num_components: V.

    Returns:
        The PCA of all rows together, with centred columns, and its scores: one row per `num_tasks` and `step`, with `pc/0`,
        `pc/1`, ...

    Raises:
        ValueError: there is no trajectory, steps do not match rows, or models have different numbers of features.
    """
    if not trajectories:
        raise ValueError("joint trajectory PCA needs at least one trajectory")
    matrices = {tasks: np.asarray(rows) for tasks, (_, rows) in trajectories.items()}
    for tasks, (steps, _) in trajectories.items():
        if matrices[tasks].ndim != 2 or len(steps) != len(matrices[tasks]):
            raise ValueError(f"M={tasks}: {len(steps)} steps but predictions {matrices[tasks].shape}")
    if len({matrix.shape[1] for matrix in matrices.values()}) > 1:
        raise ValueError("all models must predict on the same sequences")
    fitted = pca(np.concatenate(list(matrices.values())), num_components)
    table = pd.concat(
        [pd.DataFrame({"num_tasks": tasks, "step": list(steps)}) for tasks, (steps, _) in trajectories.items()],
        ignore_index=True,
    )
    return fitted, table.assign(**{f"pc/{i}": fitted.scores[:, i] for i in range(num_components)})


def reference_coordinates(
    fitted: TrajectoryPCA, xs: Tensor, ys: Tensor, tasks: Tensor, counts: Sequence[int], noise_variance: float
) -> pd.DataFrame:
    """The coordinates of the optimal predictors in a joint PCA.

    Args:
        fitted: the PCA of predictions on these sequences.
        xs, ys: (B, K, D), (B, K, 1).
        tasks: (M, D), the list of tasks that all models share.
        counts: the numbers M; each gives dMMSE for the first M tasks.
        noise_variance: σ².

    Returns:
        One row per predictor: `predictor` ("dmmse" or "ridge"), `num_tasks` (infinity for ridge), `pc/0`, `pc/1`, ...
    """
    named = [("dmmse", float(m), dmmse_predictor(xs, ys, tasks[:m], noise_variance)) for m in counts]
    named.append(("ridge", float("inf"), ridge_predictor(xs, ys, noise_variance)))
    rows = np.stack([predictions.reshape(-1).cpu().double().numpy() for _, _, predictions in named])
    table = pd.DataFrame({"predictor": [name for name, _, _ in named], "num_tasks": [m for _, m, _ in named]})
    coordinates = fitted.transform(rows)
    return table.assign(**{f"pc/{i}": coordinates[:, i] for i in range(coordinates.shape[1])})


def checkpoint_distances(
    predictor: Predictor,
    in_distribution: tuple[Tensor, Tensor],
    out_of_distribution: tuple[Tensor, Tensor],
    tasks: Tensor | None,
    noise_variance: float,
) -> pd.DataFrame:
    """Losses of one model, and its distances to the two optimal predictors.

    One row: `in_distribution/mse` on sequences of the model's own M tasks, `ood/mse` on Gaussian tasks, and the mean squared
    differences to dMMSE (`delta_dmmse`) and to ridge (`delta_ridge`) on the in-distribution sequences. If `tasks` is None
    (Gaussian tasks), `delta_dmmse` is NaN.
    """
    with torch.no_grad():
        xs, ys = in_distribution
        predictions = predictor(xs, ys)
        ridge = ridge_predictor(xs, ys, noise_variance)
        far_xs, far_ys = out_of_distribution
        row = {
            "in_distribution/mse": float((predictions - ys).square().mean()),
            "ood/mse": float((predictor(far_xs, far_ys) - far_ys).square().mean()),
            "delta_dmmse": float("nan"),
            "delta_ridge": float((predictions - ridge).square().mean()),
        }
        if tasks is not None:
            row["delta_dmmse"] = float((predictions - dmmse_predictor(xs, ys, tasks, noise_variance)).square().mean())
    return pd.DataFrame([row])


def critical_steps(table: pd.DataFrame, loss: str = "ood/mse") -> pd.DataFrame:
    """The step t_crit(M) of smallest out-of-distribution loss of each model.

    The argument has one row per `num_tasks` and `step`. The result has one row per `num_tasks`: the row with the smallest
    loss, with `step` renamed to `t_crit`, and `final_ratio`, the last loss divided by the smallest. Above 1 the
    loss has risen again; noise alone does a little of that.
    """
    ordered = table.sort_values(["num_tasks", "step"]).reset_index(drop=True)
    groups = ordered.groupby("num_tasks", sort=True)
    best = ordered.loc[groups[loss].idxmin()].reset_index(drop=True)
    final = groups[loss].last().to_numpy()
    return best.rename(columns={"step": "t_crit"}).assign(final_ratio=final / best[loss].to_numpy())


def crossover_samples(delta_loss: float, delta_llc: float) -> float:
    """The number of samples n up to which the simpler of two solutions has the lower free energy n·ℓ + λ log n.

    Differences are Δ = (specialised - simple). If Δℓ < 0 < Δλ, the simple solution is preferred while log(n)/n > a with
    a = -Δℓ/Δλ, that is up to n = -W₋₁(-a)/a (Lambert's W). The result is zero if it is never preferred (Δℓ <= 0 with Δλ < 0,
    Δℓ < 0 with Δλ = 0, or a >= 1/e), and infinite if it always is (Δℓ >= 0 with Δλ >= 0).

    Raises:
        ValueError: Δℓ > 0 > Δλ (then the roles are exchanged), or numbers are not finite.
    """
    if not np.isfinite(delta_loss) or not np.isfinite(delta_llc):
        raise ValueError(f"differences must be finite, got {delta_loss}, {delta_llc}")
    if delta_loss > 0 > delta_llc:
        raise ValueError("the 'specialised' solution is simpler and has the larger loss; exchange the two solutions")
    if delta_loss >= 0 and delta_llc >= 0:
        return float("inf")
    if delta_llc <= 0:
        return 0.0
    ratio = -delta_loss / delta_llc
    if ratio >= np.exp(-1):
        return 0.0
    return float(-lambertw(-ratio, k=-1).real / ratio)


def measure_distances(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: `checkpoint_distances` on the evaluator's sequences of the training distribution and of Gaussian tasks."""
    noise = data.config.task_config.noise_variance
    return checkpoint_distances(model, data.training_sequences, data.gaussian_sequences, data.training_tasks, noise)


def measure_scores(runs: Mapping[float, FamilyRun]) -> dict[str, pd.DataFrame]:
    """Two tables: `transient_scores`, the joint PCA of all checkpoints' predictions on sequences of the first task
    (`joint_trajectory_pca`), and `transient_references`, the optimal predictors in it (`reference_coordinates`)."""
    trajectories = {}
    for tasks, run in runs.items():
        xs, ys = run.data.root_sequences
        rows = np.empty(
            (len(run.steps), ys.numel()), dtype=np.float16
        )  # its rounding is far smaller than the differences between checkpoints
        for row, step in zip(rows, run.steps, strict=True):
            row[:] = output_row(run.model(step), xs, ys, "predictions").cpu().numpy()
        trajectories[tasks] = (run.steps, rows)
    num = sum(len(run.steps) for run in runs.values())
    fitted, scores = joint_trajectory_pca(trajectories, min(NUM_COMPONENTS, num - 1))
    shares = {f"explained_variance_ratio/{i}": share for i, share in enumerate(fitted.explained_variance_ratio)}
    counts = [int(tasks) for tasks in runs if np.isfinite(tasks)]
    data = runs[max(counts, default=np.inf)].data
    listed = data.training_tasks if data.training_tasks is not None else torch.empty(0)
    noise = data.config.task_config.noise_variance
    references = reference_coordinates(fitted, *data.root_sequences, listed, counts, noise)
    return {"transient_scores": scores.assign(**shares), "transient_references": references}
