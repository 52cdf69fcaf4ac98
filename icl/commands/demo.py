"""The demo: trains, evaluates, estimates and draws, in minutes on a CPU.

Training takes a fortieth of the paper's steps. So the stages are shorter, and the numbers are not the paper's.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from icl.baselines import ridge_predictor, zero_predictor
from icl.checkpoints import Checkpoints
from icl.devices import available_cores
from icl.estimation import LLCConfig
from icl.estimation.traces import read_estimates
from icl.evals import ValidationSet, validation_metrics, weight_norm
from icl.execution.closing import in_short
from icl.execution.llc_run import run_llc
from icl.execution.opened import Run
from icl.execution.progress import progress_bar
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.figures.demo import demo_figure
from icl.figures.style import save
from icl.model import predict
from icl.report import gather, write_report
from icl.report.page import quoted
from icl.sampling.presets import CALIBRATED
from icl.storage import LocalStore
from icl.storage.files import write_table

TASK: dict[str, Any] = {
    "task_size": 4, "max_examples": 8, "num_tasks": "inf", "noise_variance": 0.125, "embed_size": 64, "mlp_size": 64, "num_heads": 4,
    "num_layers": 2, "model_seed": 1, "pretrain_seed": None, "true_seed": None, "sampling_seed": None, "include_output": True,
}  # fmt: skip
# Smaller batches and fewer draws than in the preset. They suffice for healthy chains once the model has begun to learn.
SAMPLER: dict[str, Any] = CALIBRATED.model_dump(exclude_unset=True) | {
    "grad_batch_size": 256, "num_draws": 200, "num_burnin_steps": 60,
}  # fmt: skip


def demo_config(quick: bool) -> LLCConfig:
    """Everything the demo does, as one configuration."""
    steps = 600 if quick else 12_500
    sampler = SAMPLER | ({"num_draws": 20, "num_burnin_steps": 20, "num_chains": 2} if quick else {})
    return LLCConfig.parse(
        {
            "task_config": TASK,
            "num_steps": steps,
            "optimizer_config": {"lr": 0.003},
            "checkpointer_config": {"checkpoint_steps": {"log_space": 24, "linear_space": 24}},
            "logger_config": {"logging_steps": {"log_space": 10, "linear_space": 10}},
            "eval_batch_size": 1024,
            "sampler_config": sampler,
            "steps": {"log_space": [10, 600, 5] if quick else [100, steps, 9]},
        }
    )


def run_demo(output: Path, quick: bool, console: Console | None = None) -> None:
    """Train, evaluate, estimate and draw into the folder `output`. Results that exist are not computed again."""
    console = console or Console()
    config = demo_config(quick).resolved()
    # Named, so that no step is one without a checkpoint.
    config = config.model_copy(update={"steps": tuple(config.chosen_steps(config.training.checkpoint_steps()))})
    place = Surroundings.from_environment(store=LocalStore(output / "checkpoints"), tracking="local")
    place = replace(place, results=output / "checkpoints" / "icl", threads=available_cores(place.device))
    training = config.training
    size = training.task_config.shape.num_parameters
    console.print(f"training {size:,} parameters for {training.num_steps:,} steps on {place.device}")
    if not run_training(training, place).finished:
        raise RuntimeError("the demo was stopped; start it again to go on")
    evals, references = evaluate_run(config, place.checkpoints(training))
    if run_llc(config, place):
        raise RuntimeError("the demo was stopped; start it again to go on")
    estimates = pd.DataFrame(read_estimates(place.results / config.name))
    estimates["trusted"] = estimates["verdict"] == "healthy"

    write_table(evals, output / "evals.csv", digits=None)
    write_table(estimates, output / "llc.csv", digits=None)
    summary = summarise(evals, estimates, references)
    write_table(summary, output / "summary.csv", digits=None)
    paths = save(demo_figure(evals, estimates, references), output, "demo")
    console.print(_table(summary))
    console.print(
        f"figure: {paths[0]}   tables: {output}/evals.csv, llc.csv, summary.csv (the reasons for each verdict)"
    )
    page, folder = output / "report.html", place.results / training.name
    again = ("Write this page again.", quoted("icl", "report", str(folder), "--output", str(page)))
    first = ("Train your own runs: copy this sweep and change it.", "icl sweeps copy quick && icl train quick.yaml")
    material = gather([Run(training.name, place.store, place.results)])
    write_report(material, page, [first, again], title="The demo run")
    console.print(f"report: {page}; open it in a browser")
    console.print(what_was_seen(summary, training.num_steps))


def evaluate_run(config: LLCConfig, checkpoints: Checkpoints, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    """The validation metrics of every checkpoint, and the losses of ridge regression and of predicting zero on the same data."""
    task, shape = config.training.task_config.pretrain_task(), config.training.task_config.shape
    data = ValidationSet.draw(task, seed, size=512)
    rows = []
    steps = checkpoints.steps()
    with progress_bar("evaluating", len(steps)) as update:
        for index, step in enumerate(steps):
            weights = checkpoints.load(step)
            rows.append(
                {
                    "step": step,
                    **validation_metrics(partial(predict, shape, weights), data),
                    "weight/norm": weight_norm(weights),
                }
            )
            update(index + 1)
    ridge = validation_metrics(partial(ridge_predictor, noise_variance=task.noise_variance), data)
    zero = validation_metrics(zero_predictor, data)
    tokens = {f"ridge/{k}": ridge[f"loss/{k}"] for k in range(task.max_examples)}
    return pd.DataFrame(rows), pd.Series({"ridge": ridge["loss/mean"], "zero": zero["loss/mean"], **tokens})


def summarise(evals: pd.DataFrame, estimates: pd.DataFrame, references: pd.Series) -> pd.DataFrame:
    """One row per estimate: loss, score, robustness, λ̂ ± its standard error, health; then the reference losses."""
    score = next(name for name in evals.columns if name.startswith("icl/1:") and name != "icl/1:4")
    columns = ["step", "loss/mean", score, "ood_3_inputs_loss/mean"]
    health = ["llc/mean", "llc/mcse", "llc/rhat", "llc/ess", "verdict"]
    table = evals[columns].merge(estimates[["step", *health]], on="step")
    table["loss/ridge"], table["loss/zero"] = references["ridge"], references["zero"]
    return table


def what_was_seen(summary: pd.DataFrame, num_steps: int) -> str:
    """The run in one sentence: loss, in-context learning score and λ̂ at the start and the end, and how many estimates are healthy."""
    first, last = summary.iloc[0], summary.iloc[-1]
    score = next(name for name in summary.columns if name.startswith("icl/1:"))
    healthy = int((summary["verdict"] == "healthy").sum())

    def moved(name: str, digits: int) -> str:
        verb = "rose" if last[name] > first[name] else "fell"
        return f"{verb} from {first[name]:.{digits}f} to {last[name]:.{digits}f}"

    return (
        f"Seen over {num_steps:,} steps: the loss {moved('loss/mean', 2)} (predicting zero {last['loss/zero']:.2f}, ridge "
        f"{last['loss/ridge']:.2f}), the in-context learning score {moved(score, 2)}, and the learning coefficient "
        f"{moved('llc/mean', 1)} ± {last['llc/mcse']:.1f}; {healthy} of {len(summary)} estimates are healthy."
    )


def _table(summary: pd.DataFrame) -> Table:
    table = Table("step", "loss", "ICL score", "λ̂ ± s.e.", "R-hat", "ESS", "verdict", title="the run at a glance")
    for _, row in summary.iterrows():
        score = next(row[name] for name in summary.columns if name.startswith("icl/1:"))
        table.add_row(
            f"{row['step']}", f"{row['loss/mean']:.3f}", f"{score:.2f}", f"{row['llc/mean']:.1f} ± {row['llc/mcse']:.1f}",
            f"{row['llc/rhat']:.2f}", f"{row['llc/ess']:.0f}", in_short(str(row["verdict"])),
        )  # fmt: skip
    last = summary.iloc[-1]
    table.caption = f"loss of ridge {last['loss/ridge']:.3f}, of predicting zero {last['loss/zero']:.3f}"
    return table
