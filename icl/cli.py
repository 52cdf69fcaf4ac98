"""The command line: thin commands over the library. Errors are one line; exit status 0 done, 2 the input is wrong, 1
anything else."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from icl import __version__
from icl.execution.output import forgive_output

app = typer.Typer(
    name="icl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""The development of in-context learning in small transformers, and the local learning coefficient that
    reveals it.

    Start with `icl demo`. Then `icl train sweeps/training-runs/quick.yaml` and `icl llc
    sweeps/analysis/quick-llc.yaml`.
    """,
)

SweepFile = Annotated[
    Path | None, typer.Argument(help="A W&B sweep file. None: the run that `wandb agent` hands over.")
]
Index = Annotated[int | None, typer.Option(help="Run only this point of the grid, counted from 0.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting in every run: a.b=value. Repeatable.")
]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Runs at a time. Default: one per CPU core, or one on an accelerator.")
]
Executor = Annotated[
    str,
    typer.Option(
        help="local: processes on this machine (on an accelerator without --jobs and W&B: batch). batch: runs that differ in "
        "their seeds alone train as one. ray: an existing Ray cluster."
    ),
]
Tracking = Annotated[str, typer.Option(help="auto: files, and W&B where it is set up. Or: local, wandb, none.")]


Checkpoints = Annotated[
    int | None,
    typer.Option(
        "--checkpoints", min=1, help="How many checkpoints to take, evenly in log t; in place of the file's choice."
    ),
]
StepList = Annotated[
    str | None, typer.Option("--steps", help="The checkpoints to take: 0,100,499. In place of the file's choice.")
]
Nearest = Annotated[
    bool, typer.Option("--nearest", help="Take the nearest checkpoint where a step has none, instead of stopping.")
]


def main() -> None:
    """Entry point of the command `icl`."""
    results = forgive_output()
    try:
        status = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 1)
    except ValueError as error:
        _fail(str(error), 2)
    except MemoryError as error:
        reason = " ".join(str(error).split())
        _fail(f"there is not enough memory here ({reason}); make the model, the batches or num_chains smaller", 1)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's usage errors; their class differs between its versions
        if usage is not None:
            _fail(f"{usage()} (icl --help)", 2)
        if not isinstance(error, (RuntimeError, OSError)):
            raise  # a fault of ours: the traceback is what a report needs
        _fail(str(error), 1)
    results.flush()
    if results.failure is not None:
        _fail(f"the results could not be written to the standard output: {results.failure}", 1)
    sys.exit(status or 0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"icl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _before(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    from icl.native.allocator import keep_freed_memory

    _read_env_file(Path(".env"))
    keep_freed_memory()


def _read_env_file(path: Path) -> None:
    """Take over the variables of the file, where there is one; those that are set already stay."""
    from dotenv import load_dotenv

    try:
        load_dotenv(path.absolute())
    except (OSError, ValueError) as error:  # not UTF-8, no text, not to be read
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the settings in {path.absolute()}: {reason}; save it as text in UTF-8") from None


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the figures and tables.")] = Path("figures/demo"),
    quick: Annotated[bool, typer.Option(help="A much shorter run, for a first look at the files.")] = False,
) -> None:
    """Train the paper's transformer on a shortened schedule, evaluate it, estimate its learning coefficient, draw the
    figures.

    Minutes on two CPU cores; no account, no network, no GPU. Starting it again continues where it was stopped.
    """
    from icl.commands.demo import run_demo

    run_demo(output, quick)


@app.command()
def train(
    sweep: SweepFile = None,
    index: Index = None,
    overrides: Overrides = None,
    jobs: Jobs = None,
    executor: Executor = "local",
    tracking: Tracking = "auto",
) -> None:
    """Train every run of a sweep file here, offline; what is finished is skipped, what was interrupted goes on.

    Without a file: the run that `wandb agent` hands over. Checkpoints go to LOCAL_ROOT (default ./checkpoints) and,
    with AWS_BUCKET_NAME, to S3.
    """
    from icl.commands.sweep import run_sweep_command

    raise typer.Exit(run_sweep_command("train", sweep, index, overrides or [], jobs, executor, tracking))


@app.command()
def llc(
    sweep: SweepFile = None,
    index: Index = None,
    overrides: Overrides = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Sampler settings in place of the file's: published (arXiv 2402.02364), calibrated (the same models, "
            "chains that stay in the basin) or automatic (any model, constants by pilot chains). --set still wins."
        ),
    ] = None,
    checkpoints: Checkpoints = None,
    steps: StepList = None,
    nearest: Nearest = False,
    jobs: Jobs = None,
    executor: Executor = "local",
    tracking: Tracking = "auto",
) -> None:
    """Estimate the local learning coefficient at the checkpoints of trained runs, as a sweep file says.

    The file is an LLC sweep, or the training sweep itself: `icl train mine.yaml`, then `icl llc mine.yaml --preset
    automatic --checkpoints 5`. An LLC sweep may refer to training runs by `runs: {from: mine.yaml}`, or a list of their
    names, in place of repeating their settings.

    Without a file: the run that `wandb agent` hands over. Estimates that exist are not made again. Every estimate comes
    with a verdict in plain words, and a table of all closes. `icl calibrate` searches the sampler's constants.
    """
    from icl.commands.sweep import run_sweep_command
    from icl.execution.points import choice_overrides

    overrides = [*choice_overrides(preset, checkpoints, steps, nearest), *(overrides or [])]
    raise typer.Exit(run_sweep_command("llc", sweep, index, overrides, jobs, executor, tracking))


@app.command()
def calibrate(
    sweep: Annotated[Path, typer.Argument(help="A W&B sweep file for `icl llc`: the run, its checkpoints, its data.")],
    index: Annotated[int, typer.Option(help="The point of the grid, counted from 0.")] = 0,
    overrides: Overrides = None,
    steps: Annotated[
        list[int] | None,
        typer.Option("--step", help="A checkpoint; repeatable. Default: up to four of those that the file chooses."),
    ] = None,
    epsilons: Annotated[
        list[float] | None, typer.Option("--epsilon", help="A step size to try; repeatable. Default: 1e-6, 1e-5, 1e-4.")
    ] = None,
    gammas: Annotated[
        list[float] | None, typer.Option("--gamma", help="A localisation; repeatable. Default: 10, 100, 1000.")
    ] = None,
    nbetas: Annotated[
        list[float] | None, typer.Option("--nbeta", help="An inverse temperature; repeatable. Default: 1, 10, 100.")
    ] = None,
    chains: Annotated[int, typer.Option(min=1, help="Chains of a cell.")] = 4,
    burnin: Annotated[int, typer.Option("--burn-in", min=0, help="Steps before the first draw.")] = 200,
    draws: Annotated[int, typer.Option(min=1, help="Draws of a chain.")] = 300,
    output: Annotated[Path, typer.Option(help="Folder of the table and the trace plots.")] = Path("calibration"),
) -> None:
    """Search the sampler's constants: where is the estimate healthy, and insensitive to them?

    Samples every (epsilon, gamma, nbeta) at every checkpoint, and the named presets beside them, prints one row each,
    and recommends one setting for all checkpoints by a criterion that looks at health and sensitivity alone
    (docs/llc.md). Interrupted, it continues where it was stopped.
    """
    from icl.commands.calibrate import Budget, calibrate_command
    from icl.sampling.calibration import SearchGrid

    given = {"epsilons": epsilons, "gammas": gammas, "nbetas": nbetas}
    grid = SearchGrid(**{name: tuple(dict.fromkeys(values)) for name, values in given.items() if values})
    budget = Budget(chains, burnin, draws)
    calibrate_command(sweep, index, overrides or [], steps or [], grid, budget, output)


@app.command()
def analyse(
    run: Annotated[
        str | None,
        typer.Argument(help="The name of a trained run (`icl runs` lists them), or a folder of checkpoints."),
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            help="In place of a run: the sweep file of training runs that differ in num_tasks, to analyse together."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="An analysis to run; repeatable. Default: all but essential_dynamics, which needs a dense run. "
            "A wrong name lists them."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the tables. Default: data/<run>, or data/<name of the sweep file>.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Measure every checkpoint of a run: evaluations, Hessian, spectra, attention and more, as tidy tables.

    With --family: the runs of a training sweep over the number of tasks, in tables with a column num_tasks. They hold the
    task prior, distances to ridge and dMMSE, and the joint principal components of all runs' predictions.

    Checkpoints that a table has already are not measured again.
    """
    from icl.commands.analyse import analyse_command, analyse_family_command

    if (run is None) == (family is None):
        raise ValueError("give a run, or --family and the sweep file of several")
    if family is not None:
        analyse_family_command(family, overrides or [], only, output)
    elif overrides:
        raise ValueError("--set chooses among the runs of a sweep file; give it with --family")
    else:
        assert run is not None
        analyse_command(run, only, output)


@app.command()
def tabulate(
    sweep: Annotated[Path, typer.Argument(help="The sweep file that `icl train` or `icl llc` ran.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the tables. Default: data/<name of the sweep file>.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the table: llc, or llc_calibrated beside it.")] = "llc",
    preset: Annotated[
        str | None, typer.Option(help="Only the estimates under this preset; needed where there are several.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Bring the estimates and the training metrics of a sweep's runs into tables, with a column for each setting that
    varies.

    llc.csv has one row per run and checkpoint, llc_traces.csv.gz the course of the chains, metrics.csv what training
    logged. Runs without results yet are left out; call it again when there are more.
    """
    from icl.commands.tabulate import tabulate_command

    for path in tabulate_command(sweep, output, name, preset, overrides or []):
        print(path)


@app.command()
def stages(folder: Annotated[Path, typer.Argument(help="Folder of the tables evals and llc.")]) -> None:
    """Read the developmental stages off the tables: the changes over each, and the boundaries that the curve shows."""
    from icl.estimation.tables import write_stages

    for path in write_stages(folder):
        print(path)


@app.command()
def figures(
    data: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("data"),
    output: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes to draw in; by default one per CPU core.")] = None,
) -> None:
    """Draw every figure again from the tables under data/, as PNG and PDF. The same tables give the same files."""
    import torch

    from icl.devices import available_cores
    from icl.figures.build import build_figures

    jobs = jobs or available_cores(torch.device("cpu"))
    for path in build_figures(data, output, report=lambda line: print(line, file=sys.stderr), jobs=jobs):
        print(path)


@app.command()
def runs(
    verify: Annotated[bool, typer.Option(help="Check the checksum of every checkpoint.")] = False,
    prune: Annotated[
        int | None, typer.Option(min=1, help="Keep about this many checkpoints per run, spread over log-time.")
    ] = None,
    copy: Annotated[
        tuple[str, str] | None, typer.Option(help="Copy runs: FROM TO, each a folder or s3://bucket.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only this run.")] = None,
) -> None:
    """List the runs with their steps, size and state; check, thin out or copy them."""
    from icl.commands.runs import runs_command

    raise typer.Exit(runs_command(verify, prune, copy, name))


@app.command()
def config(
    command: Annotated[str | None, typer.Argument(help="train or llc: whose settings. Default: both.")] = None,
    words: Annotated[list[str] | None, typer.Argument(help="Only settings with one of these in their key.")] = None,
) -> None:
    """Print every setting of a run with its type, its default and what it means.

    The keys are those of sweep files and of --set.
    """
    from icl.commands.config import config_command

    config_command(command, words or [])


@app.command()
def doctor() -> None:
    """Say which device, engine, storage and W&B settings are in force, and whether each works."""
    from icl.commands.doctor import report

    raise typer.Exit(0 if report(os.environ) else 1)
