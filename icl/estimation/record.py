"""The tables and figures that are stored for one estimate, beside its metrics.

Shapes: E chains, N draws, P parameters.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from icl.estimation.config import LLCConfig
from icl.sampling import LLCResult
from icl.sampling.observables import WeightTrace
from icl.sampling.transformer_objective import make_objective, sampled_indices
from icl.sampling.units import in_weights
from icl.subjects import Subject
from icl.subjects.subject import first_batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PCA_DRAWS = 2000
"""The most draws, over all chains, that enter a principal component analysis. More cost time and show nothing new."""


def trace_table(result: LLCResult) -> pd.DataFrame:
    """One row per chain and draw: `chain`, `draw`, `loss`, `distance` ‖w − w*‖, and `llc`, the chain's estimate from its draws so far."""
    chains, draws = result.loss_trace.shape
    return pd.DataFrame(
        {
            "chain": np.repeat(np.arange(chains), draws),
            "draw": np.tile(np.arange(draws), chains),
            "loss": result.loss_trace.flatten().cpu().numpy(),
            "distance": result.distances.flatten().cpu().numpy(),
            "llc": result.running.flatten().cpu().numpy(),
        }
    )


def tables_of(config: LLCConfig, result: LLCResult) -> dict[str, pd.DataFrame]:
    """The tables that `eval_metrics` and `eval_online` ask for, by name.

    `traces`: `trace_table`, every draw (eval_online). `weights`: the chains' coordinates in principal components, `chain`, `draw`,
    `pc/0`, ..., with the explained shares `explained/0`, ... the same in every row. `covariance`: the leading values of the weight groups
    that were sampled (`icl.analysis.covariance.covariance_table`). The last two are left out if every chain diverged.
    """
    wanted, tables = table_names(config, result.any_healthy), {}
    if "traces" in wanted:
        tables["traces"] = trace_table(result)
    if result.weights is not None and "weights" in wanted:
        variance, _, scores = weight_scores(result.weights, config.plotting_config.num_components)
        tables["weights"] = scores.assign(**{f"explained/{i}": share for i, share in enumerate(variance)})
    if result.weights is not None and "covariance" in wanted:
        tables["covariance"] = _covariances(config, result.weights)
    return tables


def table_names(config: LLCConfig, any_healthy: bool) -> list[str]:
    """The names of the tables in `tables_of`, for an estimate with or without a chain that stayed finite."""
    sampler = config.sampler_config
    of_weights = [name for name in ("weights", "covariance") if name in sampler.eval_metrics and any_healthy]
    return [*(["traces"] if sampler.eval_online else []), *of_weights]


def weight_scores(trace: WeightTrace, components: int) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Principal components of the draws w - w*, without chains that diverged.

    Returns:
        The explained shares (V,), the components (V, P), and a table of coordinates `chain`, `draw`, `pc/0`, ... relative to w*.
    """
    from icl.analysis.covariance import weight_pca

    deltas, kept = _healthy(trace)
    every = -(-deltas.shape[0] * deltas.shape[1] // PCA_DRAWS)
    fitted, scores = weight_pca(deltas[:, ::every].numpy(), components)
    origin = {f"pc/{i}": scores[f"pc/{i}"] + fitted.mean @ axis for i, axis in enumerate(fitted.components)}
    draws = scores["draw"] * every * trace.every
    scores = scores.assign(chain=kept[scores["chain"]], draw=draws, **origin)
    return fitted.explained_variance_ratio, fitted.components, scores


def figures_of(
    config: LLCConfig, subject: Subject, step: int, model: nn.Module, result: LLCResult
) -> dict[str, "Figure"]:
    """The figures of one estimate that `plotting_config` asks for."""
    from icl.figures.chains import loss_trace, weight_planes

    wanted, figures = config.plotting_config, {}
    if wanted.include_loss_trace:
        figures["loss-trace"] = loss_trace(trace_table(result), result.init_loss)
    if wanted.include_weights_pca and result.weights is not None and result.any_healthy:
        shares, components, scores = weight_scores(result.weights, wanted.num_components)
        landscapes = _landscapes(config, subject, step, model, components, scores)
        figures["weights-pca"] = weight_planes(scores, shares, landscapes)
    return figures


def _healthy(trace: WeightTrace) -> tuple[Tensor, np.ndarray]:
    """w − w* (E', N, P) of the chains whose weights stayed finite, and the indices (E',) of these chains."""
    finite = torch.isfinite(trace.deltas).all(dim=-1).all(dim=-1)
    return trace.deltas[finite], finite.nonzero()[:, 0].numpy()


def _covariances(config: LLCConfig, trace: WeightTrace) -> pd.DataFrame:
    from icl.analysis.covariance import covariance_table
    from icl.analysis.weight_groups import WeightGroup, standard_pairs

    shape, sampler = config.training.task_config.shape, config.sampler_config
    index = sampled_indices(shape, sampler.include, sampler.exclude)
    place = np.full(shape.num_parameters, -1)
    place[index.numpy()] = np.arange(len(index))

    def within(group: WeightGroup) -> WeightGroup | None:
        """The group as a slice of the sampled weights, or None if it was not sampled."""
        first, length = int(place[group.entries.start]), group.entries.stop - group.entries.start
        return None if first < 0 else replace(group, entries=slice(first, first + length))

    pairs = [(within(left), within(right)) for left, right in standard_pairs(shape)]
    sampled = [(left, right) for left, right in pairs if left is not None and right is not None]
    deltas, _ = _healthy(trace)
    return covariance_table(deltas.flatten(0, 1).numpy(), sampled, sampler.num_evals)


def _landscapes(
    config: LLCConfig, subject: Subject, step: int, model: nn.Module, components: np.ndarray, scores: pd.DataFrame
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Plane (i, j) -> x (n,), y (n,) and the loss (n, n) at w* + x PC_i + y PC_j, over the draws' range plus 10 % on each side."""
    sampler = config.sampler_config
    objective = in_weights(make_objective(model.to("cpu"), subject.loss, sampler))
    batch = first_batch(subject, step, sampler)
    axes = []
    for i in range(len(components)):
        low, high = scores[f"pc/{i}"].min(), scores[f"pc/{i}"].max()
        margin = 0.1 * (high - low)
        axes.append(np.linspace(low - margin, high + margin, config.plotting_config.num_points))
    directions = torch.as_tensor(components, dtype=torch.float32)
    planes = {}
    for j in range(len(components)):
        for i in range(j):
            points = [objective.anchor + x * directions[i] + y * directions[j] for y in axes[j] for x in axes[i]]
            losses = torch.stack([objective.losses(point[None].float(), batch).mean() for point in points])
            planes[i, j] = axes[i], axes[j], losses.reshape(len(axes[j]), len(axes[i])).numpy()
    return planes
