"""The tables of docs/task-diversity.md, from data/L2H4Mfin-K8 and data/L2H4Mfin: `python -m benchmarks.task_diversity`."""

import argparse
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.pages import fill, mark, markdown_table, with_error
from benchmarks.reproduction.comparison import Change
from icl.analysis.data import AnalysisData, DataSettings
from icl.analysis.transient_ridge import crossover_samples
from icl.baselines import dmmse_predictor, ridge_predictor
from icl.config import TrainingConfig
from icl.config.sweeps import expand, load_sweep
from icl.execution.closing import in_short
from icl.figures.elements import numbers, rows_where
from icl.figures.families import read_table
from icl.figures.task_families import by_num_tasks
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[1]
FAMILY, SIXTEEN = (ROOT / "data" / name for name in ("L2H4Mfin-K8", "L2H4Mfin"))
"""The runs with K = 8 examples, and the short ones with K = 16."""
PAGE = ROOT / "docs" / "task-diversity.md"
COMMAND = "python -m benchmarks.task_diversity"
TABLES = {"absolute": "llc_calibrated", "relative": "llc_relative"}
WINDOW = 5
"""Checkpoints over which a loss is averaged; its scatter over them gives the standard error."""
CLEAR = 3.0
"""A distance has risen if it did by this many standard errors."""

EARLY, LATE = ("absolute", 10_101, 40_292), ("relative", 186_868, 499_999)
"""The units and steps between which M = 16 and M = 64 leave ridge. Units of the weights have no estimate before the first."""

PUBLISHED_SIDES = {"dMMSE": (1, 128), "between": (182, 256), "ridge": (362, 2**15)}
"""Where the fully trained models of arXiv 2501.17745 end, by the smallest and largest M of each kind (its section on transience)."""
PUBLISHED_TRANSIENT = (16, 128)
"""The M between which its loss on Gaussian tasks falls and clearly rises again."""


def page(text: str) -> str:
    """The page with its tables as the data have them now."""
    for name, content in {
        "answer": answer(), "runs": runs(), "sides": sides(), "estimates": coefficients(),
        "early trade": trade(*EARLY), "late trade": trade(*LATE), "verdicts": verdicts(), "sixteen": sixteen(),
    }.items():  # fmt: skip
        text = fill(text, mark(COMMAND, name), content)
    return text


def sweep_of(family: Path) -> Path:
    """The sweep file that trained a family."""
    return ROOT / "sweeps" / "training-runs" / f"{family.name}.yaml"


@cache
def configs(family: Path = FAMILY) -> dict[float, TrainingConfig]:
    """The settings of every run by its number of tasks."""
    parsed = [TrainingConfig.parse(data) for data in expand(load_sweep(sweep_of(family)))]
    found = {float(each.task_config.num_tasks or math.inf): each.resolved() for each in parsed}
    assert len(found) == len(parsed), "runs differ in more than the number of tasks"
    return found


def config() -> TrainingConfig:
    """The settings that all runs share."""
    return next(iter(configs().values()))


def distances(family: Path = FAMILY) -> pd.DataFrame:
    """Losses and distances at every checkpoint of the runs with finitely many tasks, in order."""
    table = read_table(family, "transient_distances")
    finite = pd.DataFrame(table.loc[np.isfinite(numbers(table, "num_tasks"))])
    return finite.sort_values(["num_tasks", "step"]).reset_index(drop=True)


@dataclass(frozen=True)
class Outcome:
    """One run: its rows where the loss on Gaussian tasks is lowest, at the end, and nearest to ridge; the squared distance of the two
    optimal predictors from each other; and by how much that loss and the distance to ridge rise to the end, with standard errors, as
    means over `WINDOW` checkpoints."""

    tasks: float
    critical: pd.Series
    last: pd.Series
    nearest: pd.Series
    apart: float
    rise: tuple[float, float]
    rise_from_ridge: tuple[float, float]

    @property
    def name(self) -> str:
        """In words of the page."""
        return f"M = {int(self.tasks):,}"

    @property
    def risen(self) -> bool:
        """Whether ridge was transient: the model was nearer to it than to dMMSE, and has left it."""
        near = self.nearest["delta_ridge"] < self.nearest["delta_dmmse"]
        return bool(near) and self.rise_from_ridge[0] > CLEAR * self.rise_from_ridge[1]

    @property
    def side(self) -> str:
        """The optimal predictor that the last model is near: the squared distance to it is below half of that to the other. "between" if
        it is near neither, "too close" if the two are closer to each other than the model is to either."""
        ridge, dmmse = self.last["delta_ridge"], self.last["delta_dmmse"]
        if self.apart < min(ridge, dmmse):
            return "too close"
        return "ridge" if ridge < 0.5 * dmmse else "dMMSE" if dmmse < 0.5 * ridge else "between"


@cache
def separation(tasks: float, family: Path = FAMILY) -> float:
    """The mean squared difference of the two optimal predictors on the evaluator's sequences of the first M tasks."""
    settings = configs(family)[tasks]
    data, noise = AnalysisData(settings, DataSettings()), settings.task_config.noise_variance
    xs, ys = data.training_sequences
    known = data.training_tasks
    assert known is not None
    return float((ridge_predictor(xs, ys, noise) - dmmse_predictor(xs, ys, known, noise)).square().mean())


def outcomes(family: Path = FAMILY, last_step: float = math.inf) -> list[Outcome]:
    """Of all runs, in order of M, as if training had ended at a step."""
    found, table = [], distances(family)
    table = table[table["step"] <= last_step]
    for tasks in sorted(set(numbers(table, "num_tasks"))):
        one = rows_where(table, num_tasks=tasks)
        lowest, nearest = (int(numbers(one, name).argmin()) for name in ("ood/mse", "delta_ridge"))
        rises = [rise(numbers(one, name), place) for name, place in (("ood/mse", lowest), ("delta_ridge", nearest))]
        found.append(
            Outcome(tasks, one.iloc[lowest], one.iloc[-1], one.iloc[nearest], separation(tasks, family), *rises)
        )
    return found


def rise(values: NDArray[np.float64], at: int) -> tuple[float, float]:
    """From a place to the end, and its standard error, from means over `WINDOW` values; NaN if the place is among the last ones."""
    first = max(at - WINDOW // 2, 0)
    if first + WINDOW > len(values) - WINDOW:
        return math.nan, math.nan
    before, after = values[first : first + WINDOW], values[-WINDOW:]
    error = math.hypot(before.std(ddof=1), after.std(ddof=1)) / math.sqrt(WINDOW)
    return float(after.mean() - before.mean()), error


def estimates(units: str) -> pd.DataFrame:
    """λ̂ of the family in one kind of units, in order of M and step."""
    return by_num_tasks(read_table(FAMILY, TABLES[units])).sort_values(["num_tasks", "step"])


def answer() -> str:
    """The page in short."""
    ends = outcomes()
    by_side = {kind: listed([run.name for run in ends if run.side == kind]) for kind in (*PUBLISHED_SIDES, "too close")}
    lines = [
        f"- Near dMMSE at the end of training: {by_side['dMMSE']}.",
        f"- Near ridge at the end: {by_side['ridge']}. Between them: {by_side['between']}.",
        f"- The two predictors are too close to each other to tell: {by_side['too close']}.",
    ]
    for run in ends:
        if run.risen:
            nearest = run.nearest
            lines += [
                f"- Ridge is transient for {run.name}. The squared distance to it is smallest at step {nearest['step']:,.0f},",
                f"  {nearest['delta_ridge']:.3f}, and {run.last['delta_ridge']:.3f} at the end. That to dMMSE falls from "
                f"{nearest['delta_dmmse']:.3f} to {run.last['delta_dmmse']:.3f}.",
            ]
    last = int(numbers(estimates("relative"), "step").max())
    for step in sorted(set(estimates("relative")["step"])):
        for units, text in (("absolute", "absolute γ"), ("relative", "units of the weights")):
            at = rows_where(estimates(units), step=step)
            found = ", ".join(f"{value:.0f}" for value in numbers(at, "llc/mean"))
            when = "the end" if step == last else f"step {step:,}"
            lines.append(
                f"- λ̂ at {when}, {text}, for {listed([f'{tasks:,.0f}' for tasks in numbers(at, 'num_tasks')])} tasks: {found}."
            )
    return "\n".join(lines)


def runs() -> str:
    """What became of each run."""
    rows = [
        [
            run.name, f"{run.last['step'] + 1:,.0f}",
            f"{run.nearest['delta_ridge']:.3f} at {run.nearest['step']:,.0f}", f"{run.nearest['delta_dmmse']:.3f}",
            f"{run.last['delta_ridge']:.3f}", told(run.rise_from_ridge), f"{run.last['delta_dmmse']:.3f}", f"{run.apart:.3f}",
            f"{run.critical['ood/mse']:.3f} at {run.critical['step']:,.0f}", told(run.rise), f"{run.last['in_distribution/mse']:.3f}",
        ]
        for run in outcomes()
    ]  # fmt: skip
    head = [
        "M", "steps", "nearest to ridge", "to dMMSE there", "to ridge, end", "its rise", "to dMMSE, end", "ridge to dMMSE",
        "lowest loss on Gaussian tasks", "its rise",
        "loss on own tasks, end",
    ]  # fmt: skip
    return markdown_table(head, rows)


def told(rise: tuple[float, float]) -> str:
    """A rise in a table; nothing where the lowest place is at the end."""
    return "" if math.isnan(rise[0]) else f"{rise[0]:+.3f} ± {rise[1]:.3f}"


def sides() -> str:
    """Where models end, published and ours."""
    ends = outcomes()
    rows = []
    for kind, (low, high) in PUBLISHED_SIDES.items():
        ours = [run.name for run in ends if run.side == kind]
        rows.append([f"end near {kind}" if kind != "between" else "end between", f"{low} to {high:,}", listed(ours)])
    risen = [run.name for run in ends if run.risen]
    rows.append(["ridge is transient", "{} to {}".format(*PUBLISHED_TRANSIENT), listed(risen)])
    rows.append(
        ["end where the two are too close to tell", "", listed([run.name for run in ends if run.side == "too close"])]
    )
    return markdown_table(["M whose models", "arXiv 2501.17745 (D = 8, K = 16, 2.65 million weights)", "ours"], rows)


def sixteen() -> str:
    """The short runs with K = 16, and those with K = 8 over the same steps."""
    short = {run.tasks: run for run in outcomes(SIXTEEN)}
    last_step = max(run.last["step"] for run in short.values())
    long = {run.tasks: run for run in outcomes(last_step=last_step)}
    rows = [
        [
            run.name, f"K = {k}", f"{run.nearest['delta_ridge']:.3f} at {run.nearest['step']:,.0f}", f"{run.nearest['delta_dmmse']:.3f}",
            f"{run.last['delta_ridge']:.3f} at {run.last['step']:,.0f}", told(run.rise_from_ridge),
            f"{run.last['delta_dmmse']:.3f}", f"{run.apart:.3f}",
            f"{run.critical['ood/mse']:.3f} at {run.critical['step']:,.0f}", told(run.rise),
        ]
        for tasks in short
        for k, run in ((8, long[tasks]), (16, short[tasks]))
    ]  # fmt: skip
    head = [
        "M", "examples", "nearest to ridge", "to dMMSE there", "to ridge, last", "its rise", "to dMMSE, last", "ridge to dMMSE",
        "lowest loss on Gaussian tasks", "its rise",
    ]  # fmt: skip
    return markdown_table(head, rows)


def coefficients() -> str:
    """λ̂ in both units at the steps that both have."""
    relative = estimates("relative")
    steps = sorted(set(relative["step"]))
    rows = []
    for tasks in sorted(set(relative["num_tasks"])):
        cells = [f"M = {tasks:,.0f}"]
        for units in TABLES:
            at = rows_where(estimates(units), num_tasks=tasks).set_index("step")
            cells += [with_error(at.loc[s, "llc/mean"], at.loc[s, "llc/mcse"]) if s in at.index else "" for s in steps]
        rows.append(cells)
    heads = [f"{units}, step {step:,}" for units in TABLES for step in steps]
    return markdown_table(["M", *heads], rows)


def change(tasks: float, units: str, first: int, last: int) -> Change:
    """Δλ̂ of one run between two steps; the errors of the two estimates are taken for independent."""
    table = estimates(units)
    before, after = (rows_where(table, num_tasks=tasks, step=step).iloc[0] for step in (first, last))
    error = math.hypot(before["llc/mcse"], after["llc/mcse"])
    return Change(float(after["llc/mean"] - before["llc/mean"]), error)


def trade(units: str, first: int, last: int) -> str:
    """The samples up to which the free energy prefers the earlier of two models, beside those that training had seen by then."""
    settings, losses = config(), distances().set_index(["num_tasks", "step"])["in_distribution/mse"]
    nats = settings.task_config.max_examples / (2 * settings.task_config.noise_variance)
    rows = []
    for run in outcomes():
        moved, loss = change(run.tasks, units, first, last), float(losses[run.tasks, last] - losses[run.tasks, first])
        counts = [samples(scale * loss, moved.value) for scale in (1.0, nats)]
        rows.append([run.name, f"{loss:+.3f}", str(moved), f"{-moved.value / loss:.0f}", *counts])
    head = ["M", "Δℓ", "Δλ̂", "−Δλ̂/Δℓ", "n, ℓ as it is", "n, ℓ in nats"]
    seen = f"From step {first:,}, when training had seen {settings.batch_size * (first + 1):,} sequences, to step {last:,}, {units} units:"
    return f"{seen}\n\n{markdown_table(head, rows)}"


def samples(delta_loss: float, delta_llc: float) -> str:
    """`crossover_samples`, in words where it is no number."""
    if delta_loss > 0 > delta_llc:
        return "roles exchanged"
    found = crossover_samples(delta_loss, delta_llc)
    return "always" if math.isinf(found) else "never" if found == 0 else f"{found:,.0f}"


def verdicts() -> str:
    """How many estimates have which verdict."""
    rows = []
    for units, name in TABLES.items():
        findings = read_table(FAMILY, name)["verdict"].map(in_short)
        counts = findings.str.partition("; needs about")[0].value_counts()
        rows += [[units, verdict, str(count)] for verdict, count in counts.items()]
    return markdown_table(["units", "verdict", "estimates"], rows)


def listed(items: list[str]) -> str:
    """A list in a sentence."""
    return ", ".join(items) if items else "none"


def main() -> None:
    """Make the tables of the page again."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_atomically(PAGE, page(PAGE.read_text()).encode())
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
