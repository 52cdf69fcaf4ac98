"""The command line: thin commands over the library.

Errors are one line. The exit status is 0 if all is done, 2 if the user's input is wrong, 75 if a scheduler's signal stopped
work that goes on when it is started again, and 1 for anything else.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from icl import __version__
from icl.execution.output import forgive_output
from icl.execution.signals import status_of_stop

app = typer.Typer(
    name="icl",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",  # so that the lines of a paragraph are joined
    pretty_exceptions_enable=False,
    help="""Train small transformers that learn in context, and estimate their local learning coefficient (LLC) along
    training.

    The LLC measures how many directions in weight space change the loss near the trained weights. Its changes over training
    show the stages in which a model develops.

    First steps:

    - `icl demo`

    - `icl sweeps copy quick`, then `icl train quick.yaml`

    - `icl sweeps copy quick-llc`, then `icl llc quick-llc.yaml`

    `icl COMMAND --help` explains one command.
    """,
)

sweeps = typer.Typer(no_args_is_help=True, help="List and copy the sweep files that come with the library.")
app.add_typer(sweeps, name="sweeps")

SweepFile = Annotated[
    Path | None,
    typer.Argument(
        help="A sweep file in the format of Weights & Biases (W&B). Under `wandb agent` it is left out; the agent gives the settings."
    ),
]
Index = Annotated[int | None, typer.Option(help="Do only the run with this number in the sweep, counted from 0.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one setting in every run, as in optimizer_config.lr=0.01. `icl config` lists all settings. Repeatable.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many runs at the same time. Default: one per CPU core, or one per accelerator (GPU or TPU)."
    ),
]
Executor = Annotated[
    str,
    typer.Option(
        help="Where runs are computed. local: in processes on this machine. batch: runs that differ only in their seeds are "
        "trained together, in one process per accelerator. ray: on a Ray cluster that is running. On an accelerator, local means "
        "batch, unless --jobs is given or W&B records the runs."
    ),
]
Tracking = Annotated[
    str,
    typer.Option(
        help="Where metrics are recorded. local: in files. wandb: in files and on W&B. none: nowhere. auto: like wandb if a key "
        "for W&B is found, otherwise like local."
    ),
]


Checkpoints = Annotated[
    int | None,
    typer.Option(
        "--checkpoints", min=1, help="How many checkpoints to take, evenly in log t. Replaces the file's choice."
    ),
]
StepList = Annotated[
    str | None, typer.Option("--steps", help="The checkpoints to take, such as 0,100,499. Replaces the file's choice.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Start nothing. Print the runs, how they differ, and the time and disk space that they will take on this machine.",
    ),
]
Nearest = Annotated[
    bool, typer.Option("--nearest", help="If a step has no checkpoint, take the nearest one instead of stopping.")
]


def main() -> None:
    """Entry point of the command `icl`."""
    results = forgive_output()
    try:
        status = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt) as stop:
        if isinstance(stop.__cause__, EOFError):  # typer takes a file that ends too early for the end of the input
            raise stop.__cause__ from None
        _fail("interrupted", status_of_stop())
    except ValueError as error:
        _fail(str(error), 2)
    except MemoryError as error:
        reason = " ".join(str(error).split())
        _fail(f"there is not enough memory ({reason}); make the model, the batches or num_chains smaller", 1)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's usage errors; their class differs between its versions
        if usage is not None:
            _fail(f"{usage()} (icl --help)", 2)
        if not isinstance(error, (RuntimeError, OSError)):
            raise  # a fault of the library: a bug report needs the traceback
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
    from icl.native.quota import limit_threads

    _read_env_file(Path(".env"))
    keep_freed_memory()
    limit_threads()


def _read_env_file(path: Path) -> None:
    """Set the environment variables of the file, if there is one. Variables that are set already stay."""
    from dotenv import load_dotenv

    try:
        load_dotenv(path.absolute())
    except (OSError, ValueError) as error:  # not readable, or not UTF-8 text
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the settings in {path.absolute()}: {reason}; save it as text in UTF-8") from None


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the figures and tables.")] = Path("demo"),
    quick: Annotated[bool, typer.Option(help="Train for only 600 steps, to see which files appear.")] = False,
) -> None:
    """Train a small transformer, evaluate it, estimate its local learning coefficient, and draw the figures.

    The model is that of arXiv 2402.02364, on a shortened schedule. This takes minutes on two CPU cores, and needs no
    account, no network and no GPU. If it is stopped, start it again and it continues.

    Examples: `icl demo`, `icl demo --quick --output /tmp/demo`.
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
    dry_run: DryRun = False,
) -> None:
    """Train every run of a sweep file.

    Finished runs are skipped. Interrupted runs continue. No account or network is needed.

    Checkpoints are written to the folder LOCAL_ROOT (an environment variable; default ./checkpoints). If AWS_BUCKET_NAME
    is set, they are also sent to that S3 bucket.

    Examples: `icl train mine.yaml --dry-run`, `icl train mine.yaml --jobs 2`, `icl train mine.yaml --set num_steps=500`.
    """
    from icl.commands.sweep import run_sweep_command

    raise typer.Exit(run_sweep_command("train", sweep, index, overrides or [], jobs, executor, tracking, dry_run))


@app.command()
def llc(
    sweep: SweepFile = None,
    index: Index = None,
    overrides: Overrides = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Use named sampler settings instead of those in the file. published: those of arXiv 2402.02364. calibrated: "
            "for the same models, with chains that stay near the weights they start from. automatic: for any model; short "
            "pilot chains choose the constants. --set is applied afterwards."
        ),
    ] = None,
    checkpoints: Checkpoints = None,
    steps: StepList = None,
    nearest: Nearest = False,
    jobs: Jobs = None,
    executor: Executor = "local",
    tracking: Tracking = "auto",
    dry_run: DryRun = False,
) -> None:
    """Estimate the local learning coefficient (LLC) at checkpoints of trained runs.

    The sweep file names the runs, the checkpoints, and the settings of the sampler. Train the runs first, with `icl train`.
    The training sweep works here too: `icl train mine.yaml`, then `icl llc mine.yaml --preset automatic --checkpoints 5`.
    Instead of repeating the settings of its training runs, an LLC sweep may refer to them by `runs: {from: mine.yaml}`.
    Estimates that exist already are not made again.

    Every estimate has a standard error and a verdict: "healthy", or what is wrong with it. At the end, a table shows all
    estimates. `icl calibrate` searches for good settings of the sampler. `icl tabulate` writes the estimates to a table.

    Examples: `icl llc mine.yaml --preset automatic --checkpoints 5`, `icl llc mine.yaml --preset calibrated --steps 0,99,499
    --dry-run`.
    """
    from icl.commands.sweep import run_sweep_command
    from icl.execution.points import choice_overrides

    overrides = [*choice_overrides(preset, checkpoints, steps, nearest), *(overrides or [])]
    raise typer.Exit(run_sweep_command("llc", sweep, index, overrides, jobs, executor, tracking, dry_run))


@app.command()
def calibrate(
    sweep: Annotated[
        Path,
        typer.Argument(help="A sweep file for `icl llc`. It names the run, its checkpoints and its data."),
    ],
    index: Annotated[int, typer.Option(help="The run with this number in the sweep, counted from 0.")] = 0,
    overrides: Overrides = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            "--step",
            help="Search at the checkpoint of this training step. Repeatable. Default: up to four of the file's checkpoints.",
        ),
    ] = None,
    epsilons: Annotated[
        list[float] | None,
        typer.Option("--epsilon", help="A step size of the sampler to try. Repeatable. Default: 1e-6, 1e-5, 1e-4."),
    ] = None,
    gammas: Annotated[
        list[float] | None,
        typer.Option(
            "--gamma",
            help="A localisation to try: the strength of the pull back to the trained weights. Repeatable. Default: 10, 100, 1000.",
        ),
    ] = None,
    nbetas: Annotated[
        list[float] | None,
        typer.Option(
            "--nbeta",
            help="An inverse temperature nβ to try: the factor of the loss. Repeatable. Default: 1, 10, 100.",
        ),
    ] = None,
    chains: Annotated[int, typer.Option(min=1, help="Chains for each setting.")] = 4,
    burnin: Annotated[int, typer.Option("--burn-in", min=0, help="Steps of a chain before its first draw.")] = 200,
    draws: Annotated[int, typer.Option(min=1, help="Draws of each chain.")] = 300,
    output: Annotated[Path, typer.Option(help="Folder for the table and the trace plots.")] = Path("calibration"),
    dry_run: DryRun = False,
) -> None:
    """Search for sampler settings at which estimates are healthy and hardly depend on the settings.

    It samples with every combination of --epsilon, --gamma and --nbeta, and with the named presets, at every chosen
    checkpoint. It prints one row for each and recommends one setting for all checkpoints. The criterion looks only at the
    health of the chains and at how sensitive the estimates are; docs/llc.md explains it.

    If it is stopped, start it again and it continues.

    Example: `icl calibrate mine.yaml --step 499 --epsilon 1e-5 --gamma 100 --nbeta 10 --dry-run`.
    """
    from icl.commands.calibrate import Budget, calibrate_command, say_cost
    from icl.sampling.calibration import SearchGrid

    given = {"epsilons": epsilons, "gammas": gammas, "nbetas": nbetas}
    grid = SearchGrid(**{name: tuple(dict.fromkeys(values)) for name, values in given.items() if values})
    budget = Budget(chains, burnin, draws)
    if dry_run:
        say_cost(sweep, index, overrides or [], steps or [], grid, budget)
    else:
        calibrate_command(sweep, index, overrides or [], steps or [], grid, budget, output)


@app.command()
def analyse(
    run: Annotated[
        str | None,
        typer.Argument(
            help="The name of a trained run (`icl runs` lists them), or a folder of checkpoints, or a sweep file of `icl llc` with a "
            "subject of your own."
        ),
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a run, a sweep file of training runs that differ in num_tasks. They are analysed together."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Do only this analysis. Repeatable. Default: all except essential_dynamics, which needs a run with many more "
            "checkpoints. An unknown name gives an error that lists all names."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the tables. Default: data/RUN, or data/NAME for a sweep file NAME.yaml."),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="For a folder of a language model's public files (checkpoint_0000100.pth): rows of tokens to measure it on, as .npy "
            "or .safetensors."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For a sweep file: how many samples of the subject's data the loss and the Hessian are measured on. Default: 1024, or "
            "all if there are fewer.",
        ),
    ] = None,
    checkpoints: Checkpoints = None,
    steps: StepList = None,
    nearest: Nearest = False,
    overrides: Overrides = None,
) -> None:
    """Measure checkpoints of a run, by default all, and write one table for each analysis.

    The analyses include evaluations, the Hessian, spectra of the weights, and attention. Checkpoints that are in a table
    already are not measured again.

    A sweep file that names a subject (`subject: {value: "my_module:MySubject"}`) works for any model. Its analyses are evals
    (the loss and the norm of the weights), hessian (trace and leading eigenvalues), and trajectory (principal components of the
    weights along the checkpoints). --set changes its settings.

    --family compares several runs that were trained on different numbers of tasks. The tables then hold the distance of each
    model to the best predictor for its own tasks (dMMSE) and for Gaussian tasks (ridge regression), the model's prior over
    tasks before it sees data, and the principal components of all models' predictions together.

    Examples: `icl analyse RUN --checkpoints 10`, `icl analyse RUN --only evals --only hessian`,
    `icl analyse mine.yaml --steps 0,100`.
    """
    from icl.commands.analyse import analyse_command, analyse_family_command

    if (run is None) == (family is None):
        raise ValueError("give the name of a run, or --family and a sweep file of several runs")
    if family is not None:
        if checkpoints is not None or steps is not None or nearest or samples is not None or tokens is not None:
            raise ValueError(
                "--checkpoints, --steps, --nearest, --samples and --tokens are for a single run or subject, not for --family"
            )
        analyse_family_command(family, overrides or [], only, output)
    else:
        assert run is not None
        analyse_command(
            run, only, output, tokens=tokens, count=checkpoints, steps=steps, nearest=nearest, overrides=overrides or [],
            samples=samples,
        )  # fmt: skip


@app.command()
def tabulate(
    sweep: Annotated[Path, typer.Argument(help="The sweep file that `icl train` or `icl llc` ran.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the tables. Default: data/<name of the sweep file>.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the table of estimates, such as llc_calibrated.")] = "llc",
    preset: Annotated[
        str | None,
        typer.Option(
            help="Take only estimates under this preset. Needed if there are estimates under several settings of the sampler."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write tables of the results of a sweep's runs, with a column for each setting that varies.

    llc.csv holds the estimates, one row per run and checkpoint. llc_traces.csv.gz holds the loss of their chains along the
    draws. metrics.csv holds the logged metrics of training. Runs without results are left out; call it again to add them.

    Examples: `icl tabulate mine.yaml`, `icl tabulate mine.yaml --preset automatic --name llc_automatic`.
    """
    from icl.commands.tabulate import tabulate_command

    for path in tabulate_command(sweep, output, name, preset, overrides or []):
        print(path)


@app.command()
def stages(
    folder: Annotated[
        Path, typer.Argument(help="Folder with the tables evals (`icl analyse`) and llc (`icl tabulate`).")
    ],
) -> None:
    """Find the stages in which a model developed, from tables of its loss and its LLC.

    It writes two tables. stages.csv says how much the loss and the LLC change over each published stage. boundaries.csv
    says where the LLC curve itself shows boundaries between stages.

    Example: `icl stages data/mine`.
    """
    from icl.estimation.tables import write_stages

    for path in write_stages(folder):
        print(path)


@app.command()
def figures(
    data: Annotated[
        Path, typer.Option(help="Folder with the tables of a run or a family, or a folder of such folders.")
    ] = Path("data"),
    output: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("figures"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes to draw in. Default: one per CPU core.")] = None,
    stages: Annotated[
        str,
        typer.Option(
            help="Stages to shade. found: those that the run's own estimates show. paper: those that arXiv 2402.02364 published for its "
            "model. none: no stages."
        ),
    ] = "found",
    verbose: Annotated[bool, typer.Option("--verbose", help="Name every figure that is drawn or left out.")] = False,
) -> None:
    """Draw every figure for which there are tables, as PNG and PDF. The same tables always give the same files.

    `icl tabulate` makes the tables of a sweep. `icl analyse` makes those of one run.

    Examples: `icl figures --data data/mine`, `icl figures --stages paper`.
    """
    from icl.commands.figures import figures_command

    if stages not in ("found", "paper", "none"):
        raise ValueError(f"--stages must be found, paper or none (got {stages!r})")
    for path in figures_command(data, output, jobs, stages, verbose):
        print(path)


@app.command()
def report(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN... | SWEEP.yaml]", help="Names of runs, or sweep files. Default: all runs."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    data: Annotated[Path, typer.Option(help="Folder in which tables of `icl analyse` are searched for.")] = Path(
        "data"
    ),
    overrides: Overrides = None,
) -> None:
    """Write one HTML file that shows everything about some runs. It opens without a server and without a network.

    It shows the settings and how they differ, losses and evaluations, the learning coefficient with errors and verdicts, the
    traces of the chains, curves per token, the stages that were found, the cost, and the commands that continue. If
    `icl analyse` measured attention and structure, it shows them too. Runs can be switched on and off.

    Examples:

    - `icl report mine.yaml` (the runs of a sweep)

    - `icl report RUN1 RUN2 --output two.html`

    - `icl report` (all runs)
    """
    from icl.commands.report import report_command

    report_command(what or [], output, data, overrides or [])


@app.command()
def runs(
    action: Annotated[
        str | None, typer.Argument(help="show, compare, export, rename or delete. Default: list all runs.")
    ] = None,
    names: Annotated[list[str] | None, typer.Argument(help="Names of the runs for the action.")] = None,
    verify: Annotated[bool, typer.Option(help="Read every checkpoint, and say which are damaged.")] = False,
    prune: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Delete checkpoints until each run has about this many, evenly spread over the logarithm of the step.",
        ),
    ] = None,
    copy: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Copy runs FROM one place TO another. A place is a folder or s3://bucket/prefix."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only this run.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="With export: write CSV. This is the only format.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="With export: a folder for runs.csv, metrics.csv and estimates.csv. Default: print runs.csv."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With delete: do not ask.")] = False,
) -> None:
    """List all runs with their dates, the settings that differ, their steps, loss, estimates, size and state.

    Actions: `icl runs show RUN`, `icl runs compare RUN RUN`, `icl runs export --csv --output FOLDER`, `icl runs rename RUN
    NAME`, `icl runs delete RUN` (or the name of estimates). The options check runs (--verify), thin them out (--prune) or
    copy them (--copy).
    """
    from icl.commands.runs import runs_command

    _ = csv
    raise typer.Exit(runs_command(verify, prune, copy, name, action=action, names=names or [], output=output, yes=yes))


@sweeps.command("list")
def list_sweeps() -> None:
    """List the sweep files: the name, the command that takes the file, and what it is for.

    Example: `icl sweeps list`.
    """
    from icl.commands.sweeps import listing, shipped

    for line in listing(list(shipped().values())):
        print(line)


@sweeps.command("copy")
def copy_sweep(
    name: Annotated[str, typer.Argument(help="The name of a sweep file, as `icl sweeps list` shows it.")],
    to: Annotated[Path, typer.Option(help="The folder for the copy.")] = Path("."),
) -> None:
    """Copy a sweep file, to run or to change it, and print the command that runs it. No file is overwritten.

    Examples: `icl sweeps copy quick`, `icl sweeps copy quick --to mine`.
    """
    from icl.commands.sweeps import copy

    print(copy(name, to))


@app.command()
def presets() -> None:
    """Print the named settings of the sampler and the purpose of each.

    Example: `icl presets`.
    """
    from icl.commands.presets import print_presets

    print_presets()


@app.command()
def config(
    command: Annotated[
        str | None,
        typer.Argument(
            help="The command whose settings are printed: train, llc, or language (train for language models). Default: train and llc."
        ),
    ] = None,
    words: Annotated[
        list[str] | None, typer.Argument(help="Print only settings whose key contains one of these words.")
    ] = None,
) -> None:
    """Print every setting with its default, its type and its meaning.

    --set takes the keys as they are printed here. In a sweep file, a dot in a key means a nested mapping.

    Examples: `icl config train lr`, `icl config llc sampler`.
    """
    from icl.commands.config import config_command

    config_command(command, words or [])


@app.command()
def doctor() -> None:
    """Check this installation: show the device, the storage and the W&B setup, and try whether each works.

    Example: `DEVICE=cpu icl doctor`.
    """
    from icl.commands.doctor import report

    raise typer.Exit(0 if report(os.environ) else 1)
