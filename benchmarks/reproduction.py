"""Every published number of arXiv 2402.02364 for linear regression beside ours: data/ in, docs/reproduction.md out.

    python -m benchmarks.reproduction

Ours come from the tables under data/L2H4Minf and, where no table has them, from its checkpoints.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.pages import markdown_table
from icl.analysis.measures import AnalysisData
from icl.analysis.run import load_model
from icl.analysis.stages import PUBLISHED_STAGE_ENDS, PUBLISHED_STAGE_TYPES
from icl.baselines import ridge_predictor
from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.evals import ValidationSet
from icl.figures.attention import find_roles
from icl.figures.build import read_table, table_names
from icl.llc_tables import ESTIMATES
from icl.model import parameter_layout
from icl.sampling import SamplerConfig
from icl.storage import LocalStore

ROOT = Path(__file__).parent.parent
TEMPLATE = Path(__file__).with_suffix(".md")
OUTPUT = ROOT / "docs" / "reproduction.md"

# arXiv 2402.02364, table of the linear-regression stages (model seed 1), and the figures named beside each use.
CHANGE_OF_LOSS = {"LR1": -0.32, "LR2": -2.21, "LR3": -0.07, "LR4": -0.05, "LR5": -0.029}
CHANGE_OF_LLC = {"LR1": 21.4, "LR2": 149.0, "LR3": -12.3, "LR4": -44.1, "LR5": 3.56}
TOLERANCE, RELATIVE_TOLERANCE = 5.0, 0.15
LOG_TOLERANCE = 0.25
LOW_NOISE = 0.125
"""Standard deviation of the label noise of the reference code's validation set; its training noise has the variance 0.125."""


@dataclass(frozen=True)
class Shipped:
    """The shipped run: its tables and checkpoints.

    Attributes:
        folder: data/L2H4Minf.
    """

    folder: Path

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Of the one run there is."""
        (name,) = [path.parent.name for path in self.folder.glob("checkpoints/icl/*/config.json")]
        return Checkpoints(LocalStore(self.folder / "checkpoints"), name)

    @cached_property
    def config(self) -> TrainingConfig:
        """As trained."""
        return TrainingConfig.parse(self.checkpoints.config()).resolved()

    @cached_property
    def data(self) -> AnalysisData:
        """The evaluator's sequences."""
        return AnalysisData(self.config)

    def table(self, name: str) -> pd.DataFrame | None:
        """A table, sorted by step where it has one; None if it is not shipped."""
        if name not in set(table_names(self.folder)):
            return None
        table = read_table(self.folder, name)
        return table.sort_values("step", kind="stable", ignore_index=True) if "step" in table else table

    def needed(self, name: str) -> pd.DataFrame:
        """A table that must be there."""
        table = self.table(name)
        return read_table(self.folder, name) if table is None else table

    @torch.no_grad()
    def squared_errors(self, step: int, xs: Tensor, ys: Tensor) -> Tensor:
        """(B,) mean over examples of each sequence's squared error."""
        model = load_model(self.checkpoints, self.config, step)
        parts = [model(a, b) for a, b in zip(xs.split(1024), ys.split(1024), strict=True)]
        return (torch.cat(parts) - ys).square().mean(dim=(1, 2)).double()

    def boundaries(self) -> dict[str, int]:
        """The checkpoint nearest to each published stage end, after the first one, "start"."""
        steps = np.array(self.checkpoints.steps())
        ends = {stage: int(steps[abs(steps - end).argmin()]) for stage, end in PUBLISHED_STAGE_ENDS.items()}
        return {"start": int(steps[0]), **ends}


def document(folder: Path = ROOT / "data" / "L2H4Minf") -> str:
    """The text of docs/reproduction.md."""
    shipped = Shipped(folder)
    llc = shipped.needed("llc")
    unsampled = [stage for stage, change in _changes(llc, shipped.boundaries()).items() if change is None]
    values = {
        "seed": shipped.config.task_config.model_seed,
        "num_steps": f"{shipped.config.num_steps:,}",
        "num_shipped": len(shipped.checkpoints.steps()),
        "num_grid": len(shipped.config.checkpoint_steps()),
        "num_estimates": len(llc),
        "num_chains": _sampler(shipped, "llc").num_chains,
        "first_estimate": llc["step"].iloc[0],
        "numbers": _numbers(shipped),
        "losses": _loss_changes(shipped),
        "coefficients": _coefficient_changes(shipped),
        "log_tolerance": LOG_TOLERANCE,
        "boundaries": _detected(shipped),
        "basin": _chains(shipped),
        "calibrated": _calibrated(shipped),
        "fits": "`stages.csv` has the same changes from smooth fits to all estimates, as the paper takes them."
        if shipped.table("stages") is not None
        else "The estimates are too few for smooth fits, which the paper takes.",
        "unsampled": ", ".join(unsampled) or "none",
        **_basin(shipped),
    }
    return TEMPLATE.read_text().format(**values)


def _numbers(shipped: Shipped) -> str:
    evals, llc = shipped.needed("evals"), shipped.needed("llc")
    size, steps = _parameters(shipped), len(shipped.config.checkpoint_steps())
    late = evals[evals["step"] >= 100]
    prior = int(late.loc[late["loss_0/mean"].idxmin(), "step"])
    peak, newest = int(llc.loc[llc["llc/mean"].idxmax(), "step"]), int(llc["step"].iloc[-1])
    peak_cells = [f"{peak:,}", _ratio(peak, 40_000)] if peak < newest else [f"after {newest:,}, the last estimate", ""]
    rows = [
        ["parameters", "51,717", f"{size:,}", f"{size - 51_717:+d}", "`icl.model`"],
        ["checkpoints of a run", "190", str(steps), f"{steps - 190:+d}", "`sweeps/training-runs/L2H4Minf.yaml`"],
        *_losses(shipped, int(evals["step"].iloc[-1])),
        ["step closest to predicting 0", "end of LR1, 1000", f"{prior:,}", _ratio(prior, 1_000), "`evals`"],
        ["peak of λ̂, published settings", "near 40,000", *peak_cells, "`llc`"],
        *_collapse(shipped.needed("layer_norm"), shipped.boundaries()),
        *_roles(shipped.needed("attention")),
        *_variance(shipped.needed("trajectory")),
    ]
    return markdown_table(["quantity", "published", "ours", "difference", "from"], rows)


def _losses(shipped: Shipped, last: int) -> Iterator[list[str]]:
    xs, ys = shipped.data.training_sequences
    ridge = ridge_predictor(xs, ys, shipped.config.task_config.noise_variance)
    yield _measured("loss at the end, evaluator", 1.74, shipped.squared_errors(last, xs, ys), "checkpoint")
    yield _measured(
        "loss of ridge, evaluator (published: the floor)",
        1.73,
        (ridge - ys).square().mean(dim=(1, 2)),
        "`icl.baselines`",
    )
    low = _low_noise(shipped)
    yield _measured("loss at the end, validation, noise 0.125", 1.52, shipped.squared_errors(last, *low), "checkpoint")
    distance = float(shipped.needed("evals")["pretrain/delta_ridge"].iloc[-1])
    yield ["squared distance to ridge at the end", "not given", f"{distance:.4f}", "", "`evals`"]


def _collapse(coordinates: pd.DataFrame, ends: Mapping[str, int]) -> Iterator[list[str]]:
    """When a quarter of a norm's gains is off: the paper has the final norm first, in LR3, then the first one, in LR4."""
    gains = coordinates[coordinates["parameter"] == "weight"]
    for layer, name, stage in (
        ("final_norm", "unembedding", "LR3"),
        ("blocks.0.attention_norm", "first attention", "LR4"),
    ):
        chosen = gains[gains["layer"] == layer]
        share = (chosen["value"].abs() < 0.1).groupby(chosen["step"]).mean()
        off = share.index[share >= 0.25]
        ours = f"step {off[0]:,}, {_stage_of(off[0], ends)}" if len(off) else "never"
        yield [f"norm before {name}: a quarter of γ below 0.1", f"in {stage}", ours, "", "`layer_norm`"]


def _roles(attention: pd.DataFrame) -> Iterator[list[str]]:
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
    if half_way:
        ours = f"{min(half_way):,} to {max(half_way):,} ({len(half_way)} roles)"
        yield ["heads specialise, steps", "10,000 to 40,000", ours, "", "`attention`"]


def _variance(trajectory: pd.DataFrame) -> Iterator[list[str]]:
    row = trajectory[trajectory["variant"] == "tokens"].iloc[0]
    for i, published in enumerate((0.65, 0.08, 0.05)):
        ours = float(row[f"explained_variance_ratio/{i}"])
        name = f"essential dynamics, variance of PC {i + 1}"
        yield [name, f"{published:.2f}", f"{ours:.2f}", f"{ours - published:+.2f}", "`trajectory`"]


def _loss_changes(shipped: Shipped) -> str:
    at = shipped.boundaries()
    evals = shipped.needed("evals").set_index("step")["pretrain/mse"]
    low = {step: float(shipped.squared_errors(step, *_low_noise(shipped)).mean()) for step in at.values()}
    rows = []
    for (stage, end), start in zip(list(at.items())[1:], list(at.values())[:-1], strict=True):
        ours, others, published = float(evals[end] - evals[start]), low[end] - low[start], CHANGE_OF_LOSS[stage]
        cells = [f"{published:g}", f"{ours:.3f}", f"{ours - published:+.3f}", f"{others:.3f}"]
        rows.append([stage, f"{start:,} to {end:,}", *cells])
    head = ["stage", "checkpoints", "Δℓ published", "ours, evaluator", "difference", "ours, validation, noise 0.125"]
    return markdown_table(head, rows)


def _coefficient_changes(shipped: Shipped) -> str:
    settings = [name for name in ESTIMATES if shipped.table(name) is not None]
    changes = {name: _changes(shipped.needed(name), shipped.boundaries()) for name in settings}
    rows = []
    for stage, published in CHANGE_OF_LLC.items():
        row = [stage, PUBLISHED_STAGE_TYPES[stage], f"{published:+g}", _change(changes["llc"][stage]), "", ""]
        found = changes["llc"][stage]
        if found is not None:
            difference = found[0] - published
            within = abs(difference) <= max(TOLERANCE, RELATIVE_TOLERANCE * abs(published))
            row[-2:] = [f"{difference:+.1f}", "yes" if within else "**no**"]
        rows.append(row + [_change(changes[name][stage]) for name in settings[1:]])
    head = ["stage", "type", "Δλ̂ published", "ours, published settings", "difference", "within the aim"]
    return markdown_table([*head, *["ours, calibrated" for _ in settings[1:]]], rows)


def _changes(llc: pd.DataFrame, at: Mapping[str, int]) -> dict[str, tuple[float, float] | None]:
    """Stage -> (change of λ̂, its standard error), None where an end has no estimate."""
    rows = llc.set_index("step")
    ends = list(at.values())[1:]
    starts = [int(rows.index[0]), *ends[:-1]]
    changes = {}
    for stage, start, end in zip(list(at)[1:], starts, ends, strict=True):
        if start not in rows.index or end not in rows.index or end <= start:
            changes[stage] = None
            continue
        both = rows.loc[[start, end]]
        change = float(both["llc/mean"].iloc[1] - both["llc/mean"].iloc[0])
        changes[stage] = change, float(np.hypot(*both["llc/mcse"]))
    return changes


def _detected(shipped: Shipped) -> str:
    found = shipped.table("boundaries")
    if found is None or found.empty:
        return "None: either no boundary is significant, or there are fewer than the eight estimates that the detector needs."
    rows = []
    for _, row in found.iterrows():
        within = "yes" if abs(row["log_ratio"]) <= LOG_TOLERANCE else "**no**"
        interval = f"{row['low']:,.0f} to {row['high']:,.0f}"
        nearest = f"{row['published']}, {row['published_step']:,.0f}"
        cells = [f"{row['probability']:.2f}", nearest, f"{row['log_ratio']:+.2f}", within]
        rows.append([f"`{row['setting']}`", f"{row['step']:,.0f}", interval, *cells])
    inner = list(PUBLISHED_STAGE_ENDS)[:-1]  # the last end is the end of training, which no curve shows
    lines = []
    for setting, mine in found.groupby("setting"):
        near = set(mine.loc[mine["log_ratio"].abs() <= LOG_TOLERANCE, "published"])
        missed = [stage for stage in inner if stage not in near]
        lines.append(
            f"- `{setting}`: {len(inner) - len(missed)} of the {len(inner)} published boundaries are found; "
            f"not found: {', '.join(f'the end of {stage}' for stage in missed) or 'none'}."
        )
    head = ["estimates", "step", "90 % interval", "probability", "nearest published end", "log ratio", "within the aim"]
    return markdown_table(head, rows) + "\n\n" + "\n".join(lines)


def _basin(shipped: Shipped) -> dict[str, object]:
    """The numbers of the section on the basin."""
    llc, sampler = shipped.needed("llc"), _sampler(shipped, "llc")
    young = llc[llc["step"] <= shipped.boundaries()["LR2"]]
    outside = llc[llc["loss/mean"] > llc["loss/zero"]]
    level = float(young["loss/mean"].mean())
    predicted = sampler.inverse_temperature * (level - young["loss/init"])
    return {
        "zero": f"{llc['loss/zero'].iloc[0]:g}",
        "num_outside": len(outside),
        "outside": "none" if outside.empty else f"steps {outside['step'].min():,} to {outside['step'].max():,}",
        "num_young": len(young),
        "level": f"{level:.3f}",
        "level_spread": f"{np.ptp(young['loss/mean']):.4f}",
        "loss_fall": f"{np.ptp(young['loss/init']):.2f}",
        "deviation": f"{(young['llc/mean'] - predicted).abs().max():.1f}",
        "nbeta": f"{sampler.inverse_temperature:.1f}",
        "distances": f"{young['distance'].min():.2f} to {young['distance'].max():.2f}",
        "norm": f"{shipped.needed('evals')['weight/norm'].iloc[0]:.0f}",
        "free_distance": f"{math.sqrt(_parameters(shipped) / sampler.localization):.2f}",
    }


def _chains(shipped: Shipped) -> str:
    """One row per estimate: where its chains were."""
    calibrated = shipped.table("llc_calibrated")
    rows = []
    for _, row in shipped.needed("llc").iterrows():
        above = "yes" if row["loss/mean"] > row["loss/zero"] else "no"
        cells = [f"{row['loss/init']:.3f}", f"{row['loss/mean']:.3f}", above, f"{row['distance']:.1f}", _estimate(row)]
        if calibrated is not None:
            same = calibrated[calibrated["step"] == row["step"]]
            cells.append("not sampled" if same.empty else _estimate(same.iloc[0]))
        rows.append([f"{row['step']:,}", *cells])
    head = ["step", "L(w)", "E[L]", "above predicting 0", "distance", "λ̂, published settings"]
    return markdown_table(head if calibrated is None else [*head, "λ̂, calibrated"], rows)


def _calibrated(shipped: Shipped) -> str:
    table = shipped.table("llc_calibrated")
    if table is None:
        return "A curve under calibrated settings is not shipped; `icl calibrate` and docs/llc.md say how to make one."
    settings = _sampler(shipped, "llc_calibrated")
    verdicts = table["verdict"].str.split(":").str[0].value_counts()
    peak = table.loc[table["llc/mean"].idxmax()]
    return (
        f"The calibrated settings (ε = {_number(settings.step_size)}, γ = {_number(settings.localization)}, "
        f"nβ = {settings.inverse_temperature:.3g}; {settings.num_chains} chains × {settings.num_draws} draws after "
        f"{settings.num_burnin_steps} steps of\nburn-in) hold the chains {table['distance'].min():.2f} to "
        f"{table['distance'].max():.2f} away from w_t. Verdicts of its {len(table)} estimates: "
        f"{', '.join(f'{name} ({count})' for name, count in verdicts.items())}.\n"
        f"Their λ̂ is largest at step {peak['step']:,}, {_estimate(peak)}. "
        "[llc-settings](../figures/L2H4Minf-seed-1/llc-settings.png) shows both curves. They estimate\ndifferent "
        "things: the calibrated one the loss near w_t, the published one a ball that hardly meets the basin."
        + _types(shipped)
    )


def _types(shipped: Shipped) -> str:
    """The kinds of stages that the calibrated curve shows."""
    stages = shipped.table("stages")
    if stages is None:
        return ""
    mine = stages[stages["setting"] == "llc_calibrated"]
    ours = ", ".join(f"{row.stage} {row.type} ({row.type_probability:.2f})" for row in mine.itertuples(index=False))
    alike = sum(PUBLISHED_STAGE_TYPES[row.stage] == row.type for row in mine.itertuples(index=False))
    return (
        f"\n\nKinds of stages under the calibrated settings, from smooth fits, with their probabilities (A: λ̂ rises, B: it "
        f"falls, while the\nloss falls): {ours}. {alike} of {len(mine)} are the published ones."
    )


def _low_noise(shipped: Shipped) -> tuple[Tensor, Tensor]:
    drawn = ValidationSet.draw(shipped.config.task_config.true_task(), noise_std=LOW_NOISE)
    return drawn.xs, drawn.ys


def _sampler(shipped: Shipped, table: str) -> SamplerConfig:
    return SamplerConfig.model_validate(json.loads((shipped.folder / f"{table}.json").read_text())["sampler_config"])


def _parameters(shipped: Shipped) -> int:
    return sum(math.prod(size) for _, size in parameter_layout(shipped.config.task_config.shape).values())


def _measured(name: str, published: float, values: Tensor, source: str) -> list[str]:
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    return [name, f"{published:.2f}", f"{mean:.2f} ± {error:.2f}", f"{mean - published:+.2f}", source]


def _change(found: tuple[float, float] | None) -> str:
    return "not sampled" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def _estimate(row: pd.Series) -> str:
    return f"{row['llc/mean']:.1f} ± {row['llc/mcse']:.1f}"


def _number(value: float | None) -> str:
    return "found by each run" if value is None else f"{value:g}"


def _ratio(ours: float, published: float) -> str:
    return f"{ours / published:.2f} times"


def _stage_of(step: float, ends: Mapping[str, int]) -> str:
    return next((stage for stage, end in ends.items() if step <= end), "after")


if __name__ == "__main__":
    OUTPUT.write_text(document())
    print(OUTPUT.relative_to(ROOT))
