"""Every published number of arXiv 2402.02364 for linear regression beside ours: data/ in, docs/reproduction.md out.

    python -m benchmarks.reproduction

Ours come from the tables under data/L2H4Minf and, where no table has them, from its checkpoints.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from benchmarks.pages import markdown_table
from benchmarks.reproduction.basin import agreement, basin, calibrated, chains, each_seed, long_chains, scale_of_weights
from benchmarks.reproduction.shipped import Shipped
from benchmarks.reproduction.stages import (
    LOG_TOLERANCE,
    boundaries_found,
    calibrated_changes,
    coefficient_changes,
    compared,
    implied_changes,
    kinds,
    loss_changes,
    low_noise_losses,
    missed,
    titles,
)
from icl.analysis.forms import forms_of, functional_trajectory
from icl.baselines import ridge_predictor
from icl.figures.attention import find_roles

ROOT = Path(__file__).parents[2]
TEMPLATE = Path(__file__).with_name("page.md")
OUTPUT = ROOT / "docs" / "reproduction.md"

FORMS = (2_500, 34_500, 106_100, 168_900)
"""Steps of the published forms: vertices of the evolute, chosen from a list by eye."""

PEAK_REACH = 3
"""How many times later than the peak a step may be to be called part of it; late estimates are near everything, being uncertain."""


@dataclass(frozen=True)
class Number:
    """One quantity of one run.

    Attributes:
        name: what it is.
        published: as text.
        target: the published number, if there is one to compare with.
        value: ours, if it is a number.
        text: ours, for people.
        source: the table it comes from.
        decimals: of differences.
    """

    name: str
    published: str
    target: float | None
    value: float | None
    text: str
    source: str
    decimals: int = 2


def document(folder: Path = ROOT / "data" / "L2H4Minf") -> str:
    """The text of docs/reproduction.md."""
    runs = Shipped.runs(folder)
    shipped = runs[0]
    unsampled = [stage for stage, change in shipped.llc_changes("llc").items() if change is None]
    values = {
        "runs": ", ".join(str(run.seed) for run in runs),
        "num_steps": f"{shipped.config.num_steps:,}",
        "num_measured": len(shipped.needed("evals")),
        "num_grid": len(shipped.config.checkpoint_steps()),
        "estimated": "; ".join(map(_estimated, runs)),
        "seed": shipped.seed,
        "numbers": _numbers(runs),
        "losses": loss_changes(runs),
        "low_noise_losses": low_noise_losses(runs),
        "coefficients": coefficient_changes(runs, lambda run: run.llc_changes("llc")),
        "smooth_coefficients": coefficient_changes(runs, lambda run: run.smooth_llc_changes("llc")),
        "late_coefficients": coefficient_changes(runs, Shipped.late_llc_changes),
        "implied": implied_changes(),
        "kinds": kinds(runs),
        "calibrated_coefficients": calibrated_changes(runs),
        "log_tolerance": LOG_TOLERANCE,
        "boundaries": boundaries_found(runs),
        "forms": _forms(runs),
        "basin": chains(shipped),
        "long": long_chains(shipped),
        "calibrated": calibrated(shipped),
        "scale": scale_of_weights(runs),
        "each": each_seed(runs),
        "agreement": "\n".join(agreement(runs)),
        "lr2_end": f"{shipped.boundaries()['LR2']:,}",
        "missed": "; ".join(missed(runs)) or "none",
        "unsampled": ", ".join(unsampled) or "none",
        "untrained": ", ".join(str(seed) for seed in range(5) if seed not in {run.seed for run in runs}) or "none",
        **basin(shipped),
    }
    return TEMPLATE.read_text().format(**values)


def _estimated(run: Shipped) -> str:
    """How many estimates under the published settings, of how many chains."""
    llc = run.table("llc")
    if llc is None:
        return f"not for seed {run.seed}"
    counts = llc["chains"].value_counts().sort_index()
    each = [f"{number} checkpoints with {chains} chains" for chains, number in counts.items()]
    return f"for seed {run.seed} at {' and at '.join(each)}"


def _numbers(runs: Sequence[Shipped]) -> str:
    rows = []
    for ours in zip(*map(_numbers_of, runs), strict=True):
        first = ours[0]
        cells = compared(first.target, [number.value for number in ours], first.decimals)
        rows.append([first.name, first.published, *(number.text for number in ours), *cells, first.source])
    head = ["quantity", "published", *titles(runs), "difference", "spread", "from"]
    return markdown_table(head, rows)


def _numbers_of(run: Shipped) -> list[Number]:
    evals, llc = run.needed("evals"), run.table("llc")
    size, steps = run.num_parameters, len(run.config.checkpoint_steps())
    return [
        Number("parameters", "51,717", 51_717, size, f"{size:,}", "`icl.model`", 0),
        Number("checkpoints of a run", "190", 190, steps, str(steps), "`sweeps/training-runs/L2H4Minf.yaml`", 0),
        *_losses(run, int(evals["step"].iloc[-1])),
        _prior(evals),
        _peak(llc),
        *_collapse(run.needed("layer_norm")),
        _roles(run.needed("attention")),
        *_variance(run),
    ]


def _prior(evals: pd.DataFrame) -> Number:
    """A place on the grid of checkpoints, and the neighbours between which the minimum lies."""
    steps, distance = (evals.loc[evals["step"] >= 100, name].to_numpy() for name in ("step", "loss_0/mean"))
    place = int(distance.argmin())
    ours = f"{steps[place]:,} ({steps[max(place - 1, 0)]:,} to {steps[min(place + 1, len(steps) - 1)]:,})"
    return Number("step closest to predicting 0", "end of LR1, 1,000", None, None, ours, "`evals`")


def _peak(llc: pd.DataFrame | None) -> Number:
    """The step of the largest estimate, and all whose estimates are within two standard errors of it."""
    ours = "not sampled"
    if llc is not None:
        top = llc.loc[llc["llc/mean"].idxmax()]
        near = llc.loc[top["llc/mean"] - llc["llc/mean"] <= 2 * np.hypot(top["llc/mcse"], llc["llc/mcse"]), "step"]
        near = near[near <= PEAK_REACH * top["step"]]
        ours = f"{top['step']:,} ({near.min():,} to {near.max():,})"
    return Number("peak of λ̂, published settings", "near 40,000", None, None, ours, "`llc`")


def _losses(run: Shipped, last: int) -> Iterator[Number]:
    xs, ys = run.data.training_sequences
    ridge = ridge_predictor(xs, ys, run.config.task_config.noise_variance)
    floor = (ridge - ys).square().mean(dim=(1, 2))
    yield _measured("loss at the end, evaluator", 1.74, run.squared_errors(last, xs, ys), "checkpoint")
    yield _measured("loss of ridge, evaluator (published: the floor)", 1.73, floor, "`icl.baselines`")
    low = run.low_noise_errors(last)
    yield _measured("loss at the end, validation, noise 0.125", 1.52, low, "checkpoint")
    distance = float(run.needed("evals")["pretrain/delta_ridge"].iloc[-1])
    yield Number("squared distance to ridge at the end", "not given", None, distance, f"{distance:.4f}", "`evals`")


def _collapse(coordinates: pd.DataFrame) -> Iterator[Number]:
    """When the gains of two norms vanish, by two measures: the paper has the final norm first, in LR3, then the first one, in LR4."""
    gains = coordinates[coordinates["parameter"] == "weight"]
    for measure, title in (("share", "a quarter of γ below 0.1"), ("mean", "mean size of γ below 0.9")):
        for layer, name, stage in (
            ("final_norm", "unembedding", "LR3"),
            ("blocks.0.attention_norm", "first attention", "LR4"),
        ):
            sizes = gains.loc[gains["layer"] == layer].set_index("step")["value"].abs()
            by_step = (sizes < 0.1 if measure == "share" else sizes).groupby(level="step").mean()
            reached = by_step >= 0.25 if measure == "share" else by_step < 0.9
            ours = "never"
            if reached.any():
                first = int(np.argmax(reached))
                ours = f"{by_step.index[max(first - 1, 0)]:,} to {by_step.index[first]:,}"
            published = f"in {stage}" if measure == "share" else "not given"
            yield Number(f"norm before {name}: {title}", published, None, None, ours, "`layer_norm`")


def _roles(attention: pd.DataFrame) -> Number:
    """When the heads that have a role at the end are half way to it."""
    half_way = []
    for role in find_roles(attention):
        mine = attention[
            (attention["block"] == role.block)
            & (attention["head"] == role.head)
            & (attention["token"] % 2 == "xy".index(role.kind))
            & (attention["token"] > 1)
        ]
        course = mine.groupby("step")[role.metric].mean()
        middle = (course.iloc[0] + course.iloc[-1]) / 2
        reached = (course >= middle) == (course.iloc[-1] >= middle)
        half_way.append(int(course.index[len(course) - int(np.argmin(reached[::-1].to_numpy()))]))
    ours = f"{min(half_way):,} to {max(half_way):,} ({len(half_way)} roles)" if half_way else "none does"
    return Number("heads specialise, steps", "10,000 to 40,000", None, None, ours, "`attention`")


def _variance(run: Shipped) -> Iterator[Number]:
    dense = run.table("essential_dynamics")
    for i, published in enumerate((0.65, 0.08, 0.05)):
        value = None
        if dense is not None:
            value = float(dense.loc[dense["variant"] == "tokens", f"explained_variance_ratio/{i}"].iloc[0])
        text = "no dense run" if value is None else f"{value:.2f}"
        title = f"essential dynamics, variance of PC {i + 1}"
        yield Number(title, f"{published:.2f}", published, value, text, "`essential_dynamics`")


def _forms(runs: Sequence[Shipped]) -> str:
    """The forms that the detector finds in dense trajectories, beside the published ones."""
    rows, remarks = [], []
    for run in runs:
        trajectory = run.table("essential_dynamics")
        if trajectory is None:
            continue
        found = forms_of(functional_trajectory(trajectory))
        if found is None or found.empty:
            remarks.append(f"The detector finds no form in seed {run.seed}.")
            continue
        steps = found["step"].to_numpy(dtype=float)
        for published in FORMS:
            near = found.iloc[int(np.abs(np.log(steps / published)).argmin())]
            ratio = math.log(near["step"] / published)
            within = "yes" if abs(ratio) <= LOG_TOLERANCE else "**no**"
            reach = f"{near['first_step']:,.0f} to {near['last_step']:,.0f}"
            agree = f"{near['spread']:.2f}"
            rows.append(
                [f"seed {run.seed}", f"{published:,}", f"{near['step']:,.0f}", reach, agree, f"{ratio:+.2f}", within]
            )
        anywhere = np.geomspace(FORMS[0], trajectory["step"].max(), 10_000)
        share = (np.abs(np.log(anywhere[:, None] / steps)).min(axis=1) <= LOG_TOLERANCE).mean()
        listed = ", ".join(f"{step:,.0f} ({spread:.2f})" for step, spread in zip(steps, found["spread"], strict=True))
        remarks.append(
            f"The detector finds {len(steps)} forms in seed {run.seed}; in brackets, by how much their planes differ: steps\n"
            f"{listed}.\nA step drawn uniformly in log t after {FORMS[0]:,} is within the aim of one of them with probability "
            f"{share:.2f}; of four such steps\nthree or more are with probability {4 * share**3 * (1 - share) + share**4:.2f}."
        )
    if not rows:
        return (
            "\n".join(remarks)
            or "None: no run is measured at equal distances (`icl analyse RUN --only essential_dynamics`)."
        )
    head = [
        "run",
        "published form",
        "nearest of ours",
        "its range of influence",
        "planes differ by",
        "log ratio",
        "within the aim",
    ]
    return markdown_table(head, rows) + "\n\n" + "\n".join(remarks)


def _measured(name: str, published: float, values: Tensor, source: str) -> Number:
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    return Number(name, f"{published:.2f}", published, mean, f"{mean:.2f} ± {error:.2f}", source)


if __name__ == "__main__":
    OUTPUT.write_text(document())
    print(OUTPUT.relative_to(ROOT))
