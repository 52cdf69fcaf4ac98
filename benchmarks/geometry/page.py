"""The tables of docs/geometry.md, from data/L2H4Minf: `python -m benchmarks.geometry.page`."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.geometry.curvature import CLEAR
from benchmarks.geometry.rescaled import writes_to_the_stream
from benchmarks.geometry.settings import FAMILY, ROOT, SETTINGS, STAGE_ENDS, Run
from benchmarks.pages import fill, mark, markdown_table, rows_of, with_error
from icl.execution.closing import in_short
from icl.figures.elements import numbers, rows_where
from icl.figures.families import read_table
from icl.storage.files import write_atomically

PAGE = ROOT / "docs" / "geometry.md"
COMMAND = "python -m benchmarks.geometry.page"
BEFORE, AFTER = STAGE_ENDS["LR2"], STAGE_ENDS["LR3"]
KINDS = {
    "write to the residual stream (embeddings, attention output, second MLP layer)": writes_to_the_stream,
    "read it after a layer norm (queries, keys, values, first MLP layer)": lambda name: (
        "qkv" in name or "mlp.up" in name
    ),
    "gains of the layer norms": lambda name: "norm.weight" in name,
    "biases of the layer norms": lambda name: "norm.bias" in name,
    "unembedding": lambda name: name.startswith("unembedding"),
}


def page(text: str) -> str:
    """The page with its tables as the data have them now."""
    for name, content in {
        "answer": answer(), "sizes": sizes(), "rescaled": rescaled(), "gamma": matched(), "LR3": third_stage(), "stage ends": stage_ends(),
        "spectrum": spectrum(), "hessian": hessian(), "verdicts": verdicts(),
    }.items():  # fmt: skip
        text = fill(text, mark(COMMAND, name), content)
    return text


def estimates(units: str) -> pd.DataFrame:
    """Estimates at the stage ends by seed and step."""
    table = read_table(FAMILY, {"absolute": "llc_calibrated", "relative": "llc_relative"}[units])
    return table[table["step"].isin(list(STAGE_ENDS.values()))].set_index(["model_seed", "step"]).sort_index()


def change(before: pd.DataFrame, after: pd.DataFrame) -> tuple[float, float]:
    """The difference of two estimates, each one row, and its standard error."""
    value = float(numbers(after, "llc/mean")[0] - numbers(before, "llc/mean")[0])
    return value, math.hypot(numbers(before, "llc/mcse")[0], numbers(after, "llc/mcse")[0])


def over_stage(units: str, seed: int, stage: str = "LR3") -> tuple[float, float] | None:
    """Δλ̂ over a stage and its standard error; None if an end was not sampled."""
    stages = list(STAGE_ENDS)
    table = estimates(units).reset_index()
    ends = (STAGE_ENDS[stages[stages.index(stage) - 1]], STAGE_ENDS[stage])
    before, after = (rows_where(table, model_seed=seed, step=step) for step in ends)
    return change(before, after) if len(before) and len(after) else None


def changes_over(units: str, stage: str = "LR3") -> dict[int, tuple[float, float]]:
    """Seed -> Δλ̂ over a stage and its error, of the seeds with both ends in relative units."""
    seeds = sorted(set(estimates("relative").index.get_level_values(0)))
    both = [seed for seed in seeds if over_stage("relative", seed, stage)]
    return {seed: found for seed in both if (found := over_stage(units, seed, stage))}


def answer() -> str:
    """What stays of the fall."""
    absolute, relative = (changes_over(units) for units in SETTINGS)
    fell = sum(value < -2 * error for value, error in relative.values())
    rose = sum(value > 2 * error for value, error in relative.values())
    lines = [
        f"- In absolute units λ̂ changes over LR3 by {summed(absolute)} (mean and spread of {len(absolute)} seeds).",
        f"- In units of the weights it changes by {summed(relative)}. It falls by more than two standard errors in",
        f"  {fell} of {len(relative)} seeds, and rises by more than two in {rose}.",
        f"- At other γ, in units of the weights, seed 1: {', '.join(over_gamma())}.",
    ]
    for gamma in (1, 10) * np.array(SETTINGS["relative"].localization):
        lines.append(
            f"- The Hessian, without any chain: {', '.join(by_hessian(gamma))} directions above γ = {gamma:g} (seed 1)."
        )
    for stage in ("LR4", "LR5"):
        absolute, relative = (changes_over(units, stage) for units in SETTINGS)
        if relative:
            lines.append(
                f"- Over {stage} λ̂ changes by {summed(absolute)} in absolute units and by {summed(relative)} in units of the weights "
                f"({len(relative)} of the seeds)."
            )
    return "\n".join(lines)


def third_stage() -> str:
    """Both ends of LR3, per seed, in both units."""
    rows = []
    for seed in changes_over("relative"):
        cells = [str(seed)]
        for units in SETTINGS:
            table = estimates(units)
            cells += [estimate(table.loc[(seed, step)]) for step in (BEFORE, AFTER)]
            cells.append(with_error(*changes_over(units)[seed], "+"))
        rows.append(cells)
    rows.append(["mean ± spread", "", "", summed(changes_over("absolute")), "", "", summed(changes_over("relative"))])
    heads = [f"{units}, {text}" for units in SETTINGS for text in (f"step {BEFORE:,}", f"step {AFTER:,}", "Δλ̂")]
    return markdown_table(["seed", *heads], rows)


def matched() -> str:
    """The relative γ that equals the absolute one at the end of LR2."""
    evals = read_table(FAMILY, "evals")
    norms = numbers(rows_where(evals, step=BEFORE), "weight/norm")
    size = Run(1).model(BEFORE).shape.num_parameters
    equal = SETTINGS["absolute"].localization * norms**2 / size
    used = SETTINGS["relative"].localization
    return (
        f"nβ is {SETTINGS['absolute'].inverse_temperature:g}, the absolute γ is {SETTINGS['absolute'].localization:g}. The relative γ that "
        f"matches is\n{equal.mean():.2f} on average ({equal.min():.2f} to {equal.max():.2f} over the seeds); {used:g} was used. Its "
        f"width is {percent(1 / math.sqrt(used))} of the weights."
    )


def stage_ends() -> str:
    """λ̂ in units of the weights at every stage end."""
    table = estimates("relative")
    rows = [
        [str(seed), *(estimate(table.loc[(seed, step)]) if (seed, step) in table.index else "not sampled" for step in STAGE_ENDS.values())]
        for seed in sorted(set(table.index.get_level_values(0)))
    ]  # fmt: skip
    return markdown_table(["seed", *(f"{stage} ends, {step:,}" for stage, step in STAGE_ENDS.items())], rows)


def spectrum() -> str:
    """λ̂(γ) of seed 1."""
    table = by_gamma()
    steps = sorted(set(table["step"]))
    rows = []
    for gamma in sorted(set(numbers(table, "gamma")), reverse=True):
        at = rows_where(table, gamma=gamma).set_index("step")
        cells = [estimate(at.loc[step]) if step in at.index else "" for step in steps]
        rows.append([f"{gamma:g}", percent(1 / math.sqrt(gamma)), *cells])
    return markdown_table(["γ", "width 1/√γ", *(f"step {step:,}" for step in steps)], rows)


def by_gamma() -> pd.DataFrame:
    """Seed 1's estimates at several γ, and those at the γ of the other seeds from the table with more chains."""
    several, one = read_table(FAMILY, "gamma_spectrum"), read_table(FAMILY, "llc_relative")
    columns = ["step", "gamma", "llc/mean", "llc/mcse", "verdict"]
    one = one.loc[(one["model_seed"] == 1) & one["step"].isin(several["step"])]
    both = pd.DataFrame(pd.concat([several, one], ignore_index=True), columns=pd.Index(columns))
    return both.drop_duplicates(["step", "gamma"], keep="last")


def over_gamma() -> list[str]:
    """Δλ̂ over LR3 at each γ whose chains stay in the basin, seed 1."""
    table, found = by_gamma(), []
    for gamma in sorted(set(numbers(table, "gamma")), reverse=True):
        before, after = (rows_where(table, gamma=gamma, step=step) for step in (BEFORE, AFTER))
        both = pd.concat([before, after])
        if len(both) == 2 and not both["verdict"].str.startswith("left the basin").any():
            value, error = change(before, after)
            found.append(f"{with_error(value, error, '+')} at γ = {gamma:g}")
    return found


def by_hessian(gamma: float) -> list[str]:
    """The soft counts of the Hessian at a γ, at the steps where it is far enough from the most negative curvature."""
    table, found = rows_where(read_table(FAMILY, "curvature"), units="relative"), []
    for step in sorted(set(table["step"])):
        at = rows_where(table, step=step, gamma=gamma)
        if not len(at):
            continue
        count, error = (float(numbers(at, name)[0]) for name in ("count", "count/std_error"))
        found.append(f"{count:.1f} ± {error:.1f} (step {step:,})")
    return found


def hessian() -> str:
    """Half the soft count of the Hessian beside λ̂, at the γ where both exist."""
    exact = rows_where(read_table(FAMILY, "curvature"), units="relative")
    rows = []
    for row in rows_of(by_gamma().sort_values(["step", "gamma"], ascending=[True, False]).rename(columns=plain)):
        at = rows_where(exact, step=row.step)
        if not len(at):
            continue
        cells = [f"{row.step:,}", f"{row.gamma:g}", with_error(row.llc_mean, row.llc_mcse)]
        near = np.isclose(numbers(at, "gamma"), row.gamma, rtol=1e-3)
        if near.any():
            half, error = (float(numbers(at, name)[near][0]) / 2 for name in ("count", "count/std_error"))
            rows.append([*cells, with_error(half, error), f"{row.llc_mean / half:.2f}"])
        else:
            least = -CLEAR * SETTINGS["relative"].inverse_temperature * float(numbers(at, "lowest")[0])
            rows.append([*cells, f"none: needs γ above {least:.2g}", ""])
    return markdown_table(["step", "γ", "λ̂, chains", "½ soft count of the Hessian", "ratio"], rows)


def sizes() -> str:
    """Root mean square of the weights by kind, seed 1."""
    run = Run(1)
    steps = [STAGE_ENDS[stage] for stage in ("LR2", "LR3", "LR5")]
    models = [dict(run.model(step).named_parameters()) for step in steps]
    rows = []
    for kind, belongs in KINDS.items():
        size = [
            float(torch.cat([value.detach().flatten() for name, value in model.items() if belongs(name)]).square().mean().sqrt())
            for model in models
        ]  # fmt: skip
        rows.append([kind, *(f"{each:.3f}" for each in size), f"{size[1] / size[0]:.2f}"])
    return markdown_table(["weights that", *(f"step {step:,}" for step in steps), "factor over LR3"], rows)


def rescaled() -> str:
    """One function with two sizes of weights."""
    table = read_table(FAMILY, "rescaled")
    rows = []
    for row in rows_of(table.rename(columns=plain)):
        before = estimates(row.units).loc[(row.model_seed, row.step)]
        losses = f"{row.loss_before:.4f}, {row.loss_after:.4f}"
        rows.append([row.change, row.units, losses, estimate(before), with_error(row.llc_mean, row.llc_mcse)])
    return markdown_table(
        ["what grows or shrinks as over LR3", "units", "loss before and after", "λ̂ before", "λ̂ after"], rows
    )


def verdicts() -> str:
    """Every estimate of this page that is not plainly healthy."""
    rows = []
    for name in ("llc_relative", "gamma_spectrum"):
        for row in rows_of(read_table(FAMILY, name)):
            if row.verdict != "healthy":
                rows.append([name, f"{row.model_seed}", f"{row.step:,}", f"{row.gamma:g}", in_short(row.verdict)])
    return markdown_table(["table", "seed", "step", "γ", "verdict"], rows)


def estimate(row: Any) -> str:
    return with_error(row["llc/mean"], row["llc/mcse"])


def plain(column: str) -> str:
    """A column's name as an attribute."""
    return column.replace("/", "_")


def summed(changes: Mapping[int, tuple[float, float]]) -> str:
    """Mean ± spread over seeds."""
    values = [value for value, _ in changes.values()]
    return f"{np.mean(values):+.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # so that --help explains, and writes nothing
    write_atomically(PAGE, page(PAGE.read_text()).encode())
    print(PAGE.relative_to(ROOT))
