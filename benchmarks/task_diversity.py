"""The tables of docs/task-diversity.md, from data/L2H4Mfin-K8: `python -m benchmarks.task_diversity`."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.pages import fill, mark, markdown_table, with_error
from icl.analysis.transient_ridge import crossover_samples
from icl.config import TrainingConfig
from icl.config.sweeps import expand, load_sweep
from icl.execution.closing import in_short
from icl.figures.elements import numbers, rows_where
from icl.figures.families import read_table
from icl.figures.task_families import by_num_tasks
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[1]
FAMILY = ROOT / "data" / "L2H4Mfin-K8"
PAGE = ROOT / "docs" / "task-diversity.md"
SWEEP = ROOT / "sweeps" / "training-runs" / "L2H4Mfin-K8.yaml"
COMMAND = "python -m benchmarks.task_diversity"
TABLES = {"absolute": "llc_calibrated", "relative": "llc_relative"}
WINDOW = 5
"""Checkpoints over which a loss is averaged; its scatter over them gives the standard error."""
CLEAR = 3.0
"""A distance has risen if it did by this many standard errors."""

PUBLISHED_SIDES = {"dMMSE": (1, 128), "between": (182, 256), "ridge": (362, 2**15)}
"""Where the fully trained models of arXiv 2501.17745 end, by the smallest and largest M of each kind (its section on transience)."""
PUBLISHED_TRANSIENT = (16, 128)
"""The M between which its loss on Gaussian tasks falls and clearly rises again."""


def page(text: str) -> str:
    """The page with its tables as the data have them now."""
    for name, content in {
        "answer": answer(), "runs": runs(), "sides": sides(), "estimates": coefficients(), "trade": trade(), "verdicts": verdicts(),
    }.items():  # fmt: skip
        text = fill(text, mark(COMMAND, name), content)
    return text


def config() -> TrainingConfig:
    """The settings that all runs share."""
    return TrainingConfig.parse(expand(load_sweep(SWEEP))[0])


def distances() -> pd.DataFrame:
    """Losses and distances at every checkpoint of the runs with finitely many tasks, in order."""
    table = read_table(FAMILY, "transient_distances")
    finite = pd.DataFrame(table.loc[np.isfinite(numbers(table, "num_tasks"))])
    return finite.sort_values(["num_tasks", "step"]).reset_index(drop=True)


@dataclass(frozen=True)
class Outcome:
    """One run: its row where the loss on Gaussian tasks is lowest, its last row, and by how much that loss and the distance to ridge
    rose between them, with standard errors, as means over `WINDOW` checkpoints."""

    tasks: float
    critical: pd.Series
    last: pd.Series
    rise: tuple[float, float]
    rise_from_ridge: tuple[float, float]

    @property
    def name(self) -> str:
        """In words of the page."""
        return f"M = {int(self.tasks):,}"

    @property
    def risen(self) -> bool:
        """Whether ridge was transient."""
        return self.rise_from_ridge[0] > CLEAR * self.rise_from_ridge[1]

    @property
    def side(self) -> str:
        """The optimal predictor that the last model is near: the squared distance to it is below half of that to the other."""
        ratio = self.last["delta_ridge"] / self.last["delta_dmmse"]
        return "ridge" if ratio < 0.5 else "dMMSE" if ratio > 2 else "between"


def outcomes() -> list[Outcome]:
    """Of all runs, in order of M."""
    found = []
    for tasks in sorted(set(numbers(distances(), "num_tasks"))):
        one = rows_where(distances(), num_tasks=tasks)
        lowest = int(numbers(one, "ood/mse").argmin())
        rises = [rise(numbers(one, name), lowest) for name in ("ood/mse", "delta_ridge")]
        found.append(Outcome(tasks, one.iloc[lowest], one.iloc[-1], *rises))
    return found


def rise(values: NDArray[np.float64], at: int) -> tuple[float, float]:
    """From a place to the end, and its standard error, from means over `WINDOW` values."""
    first = min(max(at - WINDOW // 2, 0), len(values) - WINDOW)
    before, after = values[first : first + WINDOW], values[-WINDOW:]
    error = math.hypot(before.std(ddof=1), after.std(ddof=1)) / math.sqrt(WINDOW)
    return float(after.mean() - before.mean()), error


def estimates(units: str) -> pd.DataFrame:
    """λ̂ of the family in one kind of units, in order of M and step."""
    return by_num_tasks(read_table(FAMILY, TABLES[units])).sort_values(["num_tasks", "step"])


def answer() -> str:
    """The page in short."""
    ends = outcomes()
    by_side = {kind: listed([run.name for run in ends if run.side == kind]) for kind in PUBLISHED_SIDES}
    risen = [run for run in ends if run.risen]
    lines = [
        f"- At the end of training the models near dMMSE are: {by_side['dMMSE']}. Near ridge: {by_side['ridge']}. Between them: "
        f"{by_side['between']}.",
        f"- Ridge is transient for {listed([run.name for run in risen])}: the model comes near it and leaves it again.",
    ]
    for run in risen:
        for units, text in (("absolute", "with an absolute γ"), ("relative", "in units of the weights")):
            change, control = over_transience(run, units), over_transience(run, units, ends[-1].tasks)
            if change and control:
                lines.append(
                    f"- {run.name}: from step {change.first:,} to the end λ̂ changes by {change} {text}. For {ends[-1].name} it changes "
                    f"by {control} over the same steps."
                )
    return "\n".join(lines)


def runs() -> str:
    """What became of each run."""
    rows = []
    for run in outcomes():
        one = rows_where(distances(), num_tasks=run.tasks)
        nearest = one.iloc[int(numbers(one, "delta_ridge").argmin())]
        rows.append(
            [
                run.name, f"{run.last['step'] + 1:,.0f}", f"{nearest['delta_ridge']:.3f} at {nearest['step']:,.0f}",
                f"{run.last['delta_ridge']:.3f}", f"{run.last['delta_dmmse']:.3f}",
                f"{run.critical['ood/mse']:.3f} at {run.critical['step']:,.0f}", f"{run.rise[0]:+.3f} ± {run.rise[1]:.3f}",
                f"{run.rise_from_ridge[0]:+.3f} ± {run.rise_from_ridge[1]:.3f}", f"{run.last['in_distribution/mse']:.3f}",
            ]
        )  # fmt: skip
    head = [
        "M", "steps", "nearest to ridge", "to ridge, end", "to dMMSE, end", "lowest loss on Gaussian tasks", "its rise to the end",
        "rise of the distance to ridge", "loss on own tasks, end",
    ]  # fmt: skip
    return markdown_table(head, rows)


def sides() -> str:
    """Where models end, published and ours."""
    ends = outcomes()
    rows = []
    for kind, (low, high) in PUBLISHED_SIDES.items():
        ours = [run.name for run in ends if run.side == kind]
        rows.append([f"end near {kind}" if kind != "between" else "end between", f"{low} to {high:,}", listed(ours)])
    risen = [run.name for run in ends if run.risen]
    rows.append(["ridge is transient", "{} to {}".format(*PUBLISHED_TRANSIENT), listed(risen)])
    return markdown_table(["M whose models", "arXiv 2501.17745 (D = 8, K = 16, 2.65 million weights)", "ours"], rows)


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


@dataclass(frozen=True)
class Change:
    """Δλ̂ between the estimates at two steps, and its standard error, the two taken for independent."""

    first: int
    last: int
    value: float
    error: float

    def __str__(self) -> str:
        return with_error(self.value, self.error, "+")


def over_transience(run: Outcome, units: str, tasks: float | None = None) -> Change | None:
    """Δλ̂ from the estimate nearest in log t to the lowest loss on Gaussian tasks of a run to its end; None without two estimates.

    Args:
        run: sets the steps.
        units: of γ.
        tasks: M of the model that is measured; None: that of the run.
    """
    one = rows_where(estimates(units), num_tasks=run.tasks)
    if len(one) < 2:
        return None
    nearest = one.iloc[int(np.abs(np.log(numbers(one, "step") / run.critical["step"])).argmin())]["step"]
    measured = rows_where(estimates(units), num_tasks=run.tasks if tasks is None else tasks).set_index("step")
    ends = [int(nearest), int(one.iloc[-1]["step"])]
    if ends[0] == ends[1] or not set(ends) <= set(measured.index):
        return None
    before, after = (measured.loc[step] for step in ends)
    error = math.hypot(before["llc/mcse"], after["llc/mcse"])
    return Change(ends[0], ends[1], float(after["llc/mean"] - before["llc/mean"]), error)


def trade() -> str:
    """The samples up to which the free energy prefers the general solution, beside those that training had seen."""
    settings, losses = config(), distances().set_index(["num_tasks", "step"])["in_distribution/mse"]
    nats = settings.task_config.max_examples / (2 * settings.task_config.noise_variance)
    rows = []
    for run in (run for run in outcomes() if run.risen):
        for units in TABLES:
            change = over_transience(run, units)
            if change is None:
                continue
            loss = float(losses[run.tasks, change.last] - losses[run.tasks, change.first])
            counts = [samples(scale * loss, change.value) for scale in (1.0, nats)]
            rows.append(
                [run.name, units, f"{loss:+.3f}", str(change), *counts, f"{settings.batch_size * change.first:,}"]
            )
    head = ["M", "units", "Δℓ", "Δλ̂", "n, ℓ as it is", "n, ℓ in nats", "sequences seen at the first"]
    return markdown_table(head, rows)


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
