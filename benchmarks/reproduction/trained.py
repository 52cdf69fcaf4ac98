"""The section on the trained models: size, and losses at the end of training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.pages import markdown_table
from benchmarks.reproduction import published
from benchmarks.reproduction.comparison import HEAD, Comparison
from benchmarks.reproduction.shipped import Shipped, titles
from icl.baselines import ridge_predictor


@dataclass(frozen=True)
class Quantity:
    """One row.

    Attributes:
        name: what it is.
        comparison: the numbers.
        texts: ours, one per run.
        decimals: of the published number.
        source: where ours come from.
    """

    name: str
    comparison: Comparison
    texts: Sequence[str]
    decimals: int
    source: str


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the section stand for."""
    quantities = {
        "parameters": _counted("parameters", published.NUM_PARAMETERS, [run.num_parameters for run in runs], "`icl.model`"),
        "checkpoints": _counted(
            "checkpoints of a run", published.NUM_CHECKPOINTS, [len(run.config.checkpoint_steps()) for run in runs],
            "`sweeps/training-runs/L2H4Minf.yaml`",
        ),
        "end_loss": _measured("loss ℓ, evaluator", published.END_LOSS, list(map(_end_errors, runs)), "checkpoint"),
        "ridge_loss": _measured("loss of ridge, evaluator", published.LOSS_FLOOR, list(map(_ridge_errors, runs)), "`icl.baselines`"),
        "low_noise_loss": _measured(
            "loss ℓ, validation set", published.LOW_NOISE_LOSS,
            [run.low_noise_errors(_last_step(run)) for run in runs], "checkpoint",
        ),
        "ridge_distance": _distances(runs),
    }  # fmt: skip
    comparisons = {name: quantity.comparison for name, quantity in quantities.items()}
    return {**comparisons, "trained": _table(quantities, runs), "excess_loss": _excess(comparisons)}


def _table(quantities: dict[str, Quantity], runs: Sequence[Shipped]) -> str:
    rows = []
    for quantity in quantities.values():
        target = quantity.comparison.published
        shown = "not given" if target is None else f"{target:,.{quantity.decimals}f}"
        cells = quantity.comparison.cells(max(quantity.decimals, 2 * (len(set(quantity.comparison.values)) > 1)))
        rows.append([quantity.name, shown, *quantity.texts, *cells, quantity.source])
    return markdown_table(["at the end of training", "published", *titles(runs), *HEAD, "from"], rows)


def _excess(comparisons: dict[str, Comparison]) -> Comparison:
    """How far the loss is above that of ridge on the same sequences."""
    pairs = zip(comparisons["end_loss"].values, comparisons["ridge_loss"].values, strict=True)
    return Comparison(published.END_LOSS - published.LOSS_FLOOR, [ours - ridge for ours, ridge in pairs])


def _last_step(run: Shipped) -> int:
    return int(run.needed("evals")["step"].iloc[-1])


def _end_errors(run: Shipped) -> Tensor:
    return run.squared_errors(_last_step(run), *run.data.training_sequences)


def _ridge_errors(run: Shipped) -> Tensor:
    xs, ys = run.data.training_sequences
    return (ridge_predictor(xs, ys, run.config.task_config.noise_variance) - ys).square().mean(dim=(1, 2))


def _distances(runs: Sequence[Shipped]) -> Quantity:
    values = [float(run.needed("evals")["pretrain/delta_ridge"].iloc[-1]) for run in runs]
    texts = [f"{value:.4f}" for value in values]
    return Quantity("mean squared difference to ridge, evaluator", Comparison(None, values), texts, 4, "`evals`")


def _counted(name: str, target: int, values: list[int], source: str) -> Quantity:
    return Quantity(name, Comparison(target, values), [f"{value:,}" for value in values], 0, source)


def _measured(name: str, target: float, errors: list[Tensor], source: str) -> Quantity:
    """Means over sequences, with their standard errors."""
    means = [float(each.mean()) for each in errors]
    texts = [
        f"{mean:.2f} ± {float(each.std()) / math.sqrt(len(each)):.2f}" for mean, each in zip(means, errors, strict=True)
    ]
    return Quantity(name, Comparison(target, means), texts, 2, source)
