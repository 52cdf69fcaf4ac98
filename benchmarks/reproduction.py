"""Every published number of arXiv 2402.02364 for linear regression beside ours: data/ in, docs/reproduction.md out.

    python -m benchmarks.reproduction

Ours come from the tables under data/L2H4Minf and, where no table has them, from its checkpoints.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from benchmarks.pages import markdown_table
from benchmarks.reproduction_stages import (
    LOG_TOLERANCE,
    boundaries_found,
    calibrated_changes,
    certainty_of_misses,
    coefficient_changes,
    compared,
    loss_changes,
    low_noise_losses,
    missed,
    smooth_coefficient_changes,
    titles,
)
from benchmarks.shipped_runs import Shipped
from icl.analysis.stages import PUBLISHED_STAGE_TYPES
from icl.baselines import ridge_predictor
from icl.figures.attention import find_roles
from icl.figures.build import forms_of, functional_trajectory

ROOT = Path(__file__).parent.parent
TEMPLATE = Path(__file__).with_suffix(".md")
OUTPUT = ROOT / "docs" / "reproduction.md"

FORMS = (2_500, 34_500, 106_100, 168_900)
"""Steps of the published forms: vertices of the evolute, chosen from a list by eye."""


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
        decimals: of differences; None compares by ratio.
    """

    name: str
    published: str
    target: float | None
    value: float | None
    text: str
    source: str
    decimals: int | None = 2


def document(folder: Path = ROOT / "data" / "L2H4Minf") -> str:
    """The text of docs/reproduction.md."""
    runs = Shipped.runs(folder)
    shipped = runs[0]
    llc = shipped.needed("llc")
    unsampled = [stage for stage, change in shipped.llc_changes("llc").items() if change is None]
    values = {
        "runs": ", ".join(str(run.seed) for run in runs),
        "num_steps": f"{shipped.config.num_steps:,}",
        "num_measured": len(shipped.needed("evals")),
        "num_grid": len(shipped.config.checkpoint_steps()),
        "estimated": "; ".join(map(_estimated, runs)),
        "seed": shipped.seed,
        "num_estimates": len(llc),
        "first_estimate": llc["step"].iloc[0],
        "numbers": _numbers(runs),
        "losses": loss_changes(runs),
        "low_noise_losses": low_noise_losses(runs),
        "coefficients": coefficient_changes(runs),
        "smooth_coefficients": smooth_coefficient_changes(runs),
        "certainty": certainty_of_misses(runs),
        "calibrated_coefficients": calibrated_changes(runs),
        "log_tolerance": LOG_TOLERANCE,
        "boundaries": boundaries_found(runs),
        "forms": _forms(runs),
        "basin": _chains(shipped),
        "calibrated": _calibrated(shipped),
        "each": "\n".join([*map(_each_seed, runs), *_agreement(runs)]),
        "lr2_end": f"{shipped.boundaries()['LR2']:,}",
        "missed": "; ".join(missed(runs)) or "none",
        "unsampled": ", ".join(unsampled) or "none",
        "untrained": ", ".join(str(seed) for seed in range(5) if seed not in {run.seed for run in runs}) or "none",
        **_basin(shipped),
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
    late = evals[evals["step"] >= 100]
    prior = int(late.loc[late["loss_0/mean"].idxmin(), "step"])
    return [
        Number("parameters", "51,717", 51_717, size, f"{size:,}", "`icl.model`", 0),
        Number("checkpoints of a run", "190", 190, steps, str(steps), "`sweeps/training-runs/L2H4Minf.yaml`", 0),
        *_losses(run, int(evals["step"].iloc[-1])),
        Number("step closest to predicting 0", "end of LR1, 1000", 1_000, prior, f"{prior:,}", "`evals`", None),
        _peak(llc),
        *_collapse(run.needed("layer_norm"), run.boundaries()),
        _roles(run.needed("attention")),
        *_variance(run),
    ]


def _peak(llc: pd.DataFrame | None) -> Number:
    value, text = None, "not sampled"
    if llc is not None:
        peak, newest = int(llc.loc[llc["llc/mean"].idxmax(), "step"]), int(llc["step"].max())
        value, text = (peak, f"{peak:,}") if peak < newest else (None, f"after {newest:,}, the last estimate")
    return Number("peak of λ̂, published settings", "near 40,000", 40_000, value, text, "`llc`", None)


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


def _collapse(coordinates: pd.DataFrame, ends: Mapping[str, int]) -> Iterator[Number]:
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
        yield Number(f"norm before {name}: a quarter of γ below 0.1", f"in {stage}", None, None, ours, "`layer_norm`")


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
        found = forms_of(functional_trajectory({"essential_dynamics": trajectory}))
        if found is None or found.empty:
            remarks.append(f"The detector finds no form in seed {run.seed}.")
            continue
        steps = found["step"].to_numpy(dtype=float)
        for published in FORMS:
            near = found.iloc[int(np.abs(np.log(steps / published)).argmin())]
            ratio = math.log(near["step"] / published)
            within = "yes" if abs(ratio) <= LOG_TOLERANCE else "**no**"
            reach = f"{near['first_step']:,.0f} to {near['last_step']:,.0f}"
            rows.append([f"seed {run.seed}", f"{published:,}", f"{near['step']:,.0f}", reach, f"{ratio:+.2f}", within])
        anywhere = np.geomspace(FORMS[0], trajectory["step"].max(), 10_000)
        share = (np.abs(np.log(anywhere[:, None] / steps)).min(axis=1) <= LOG_TOLERANCE).mean()
        listed = ", ".join(f"{step:,.0f}" for step in steps)
        remarks.append(
            f"The detector finds {len(steps)} forms in seed {run.seed}: steps {listed}. A step drawn uniformly in log t "
            f"after {FORMS[0]:,} is within the aim of one of them with probability {share:.2f}; of four such steps three or more "
            f"are with probability {4 * share**3 * (1 - share) + share**4:.2f}."
        )
    if not rows:
        return (
            "\n".join(remarks)
            or "None: no run is measured at equal distances (`icl analyse RUN --only essential_dynamics`)."
        )
    head = ["run", "published form", "nearest of ours", "its range of influence", "log ratio", "within the aim"]
    return markdown_table(head, rows) + "\n\n" + "\n".join(remarks)


def _each_seed(run: Shipped) -> str:
    """What the estimates of a seed say of its chains and stages, in a line."""
    llc, calibrated = run.table("llc"), run.table("llc_calibrated")
    parts = []
    if llc is not None:
        outside = int((llc["loss/mean"] > llc["loss/zero"]).sum())
        young = llc[llc["step"] <= run.boundaries()["LR2"]]
        nbeta = run.sampler("llc").inverse_temperature
        predicted = nbeta * (float(young["loss/mean"].mean()) - young["loss/init"])
        parts.append(
            f"the published chains do worse than predicting 0 at {outside} of {len(llc)} checkpoints, and up to step "
            f"{young['step'].max():,} λ̂ is the loss curve turned over to within {(young['llc/mean'] - predicted).abs().max():.1f}"
        )
    if calibrated is not None:
        peak = calibrated.loc[calibrated["llc/mean"].idxmax()]
        parts.append(f"the calibrated λ̂ is largest at step {peak['step']:,}, {_estimate(peak)}{_kinds(run)}")
    return f"- Seed {run.seed}: {'; '.join(parts) or 'not sampled'}."


def _agreement(runs: Sequence[Shipped]) -> Iterator[str]:
    """How far the estimates of the seeds lie apart at the checkpoints that all of them have."""
    for name, title in (("llc", "published"), ("llc_calibrated", "calibrated")):
        tables = [table.set_index("step")["llc/mean"] for run in runs if (table := run.table(name)) is not None]
        if len(tables) > 1:
            both = pd.concat(tables, axis=1, join="inner")
            apart = both.max(axis=1) - both.min(axis=1)
            yield (
                f"- Between seeds, at {len(both)} common checkpoints, λ̂ under the {title} settings differs by "
                f"{apart.median():.1f} in the median and by {apart.max():.1f} at most (step {apart.idxmax():,}), over a range "
                f"of {np.ptp(both.to_numpy()):.0f}."
            )


def _basin(shipped: Shipped) -> dict[str, object]:
    """The numbers of the section on the basin."""
    llc, sampler = shipped.needed("llc"), shipped.sampler("llc")
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
        "free_distance": f"{math.sqrt(shipped.num_parameters / sampler.localization):.2f}",
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
    settings = shipped.sampler("llc_calibrated")
    verdicts = table["verdict"].str.split(":").str[0].value_counts()
    peak = table.loc[table["llc/mean"].idxmax()]
    return (
        f"The calibrated settings (ε = {_number(settings.step_size)}, γ = {_number(settings.localization)}, "
        f"nβ = {settings.inverse_temperature:.3g}; {table['chains'].max()} chains × {settings.num_draws} draws after "
        f"{settings.num_burnin_steps} steps of\nburn-in) hold the chains {table['distance'].min():.2f} to "
        f"{table['distance'].max():.2f} away from w_t. Verdicts of its {len(table)} estimates: "
        f"{', '.join(f'{name} ({count})' for name, count in verdicts.items())}.\n"
        f"Their λ̂ is largest at step {peak['step']:,}, {_estimate(peak)}. "
        "[llc-settings](../figures/L2H4Minf-seed-1/llc-settings.png) shows both curves. They estimate\ndifferent "
        "things: the calibrated one the loss near w_t, the published one a ball that hardly meets the basin."
    )


def _kinds(run: Shipped) -> str:
    """The kinds of stages that the calibrated curve shows, as the end of a sentence."""
    stages = run.table("stages")
    mine = pd.DataFrame() if stages is None else stages[stages["setting"] == "llc_calibrated"]
    if mine.empty:
        return ""
    ours = ", ".join(f"{row.stage} {row.type} ({row.type_probability:.2f})" for row in mine.itertuples(index=False))
    alike = sum(PUBLISHED_STAGE_TYPES[row.stage] == row.type for row in mine.itertuples(index=False))
    return f"; kinds of its stages, with their probabilities: {ours}; {alike} of {len(mine)} are the published ones"


def _measured(name: str, published: float, values: Tensor, source: str) -> Number:
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    return Number(name, f"{published:.2f}", published, mean, f"{mean:.2f} ± {error:.2f}", source)


def _estimate(row: pd.Series) -> str:
    return f"{row['llc/mean']:.1f} ± {row['llc/mcse']:.1f}"


def _number(value: float | None) -> str:
    return "found by each run" if value is None else f"{value:g}"


def _stage_of(step: float, ends: Mapping[str, int]) -> str:
    return next((stage for stage, end in ends.items() if step <= end), "after")


if __name__ == "__main__":
    OUTPUT.write_text(document())
    print(OUTPUT.relative_to(ROOT))
