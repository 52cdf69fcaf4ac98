"""The files of examples/ by icl and by devinterp 2.0.1: lines of code, both estimates at equal settings and gradients, icl's verdict.

    python -m benchmarks.llc.examples [--quick] [--only NAME] [--output data/llc_accuracy]

Model, loss and data are those of the example on both sides. icl's lines are those of its function `estimate`, and of the sweep file where
it writes one. devinterp's are those of the function of `benchmarks.llc.examples_by_devinterp`. Blank lines, docstrings and imports do not
count. devinterp runs at the nβ, γ and ε of icl's estimate, and spends as many gradients, pilot and tests included (those of the chains,
where the example goes through `icl llc`). Seconds are those of the processor, child processes included. Rows are appended to examples.csv
as they come, and examples that are there are not run again. With --quick nothing is written, unless --output is given.
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import math
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
import xarray as xr

from benchmarks.llc import examples_by_devinterp
from benchmarks.llc.examples_by_devinterp import Given
from benchmarks.llc.honesty import gradients_of
from icl.sampling import LLCResult
from icl.storage.files import write_table

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("deep_linear", "superposition", "modular_addition", "digits", "gpt2", "own_checkpoints")


@dataclass(frozen=True)
class Estimate:
    """icl's estimate at one checkpoint, and what devinterp is given for its own.

    Attributes:
        known: the coefficient, where it is known; otherwise NaN.
        other: devinterp's estimate, made when it is called with settings; it has `llc_mean` and `llc_std`.
    """

    step: int
    value: float
    error: float
    verdict: str
    gradients: int
    nbeta: float
    gamma: float
    epsilon: float
    chains: int
    seconds: float
    other: Callable[[Given], xr.Dataset]
    known: float = math.nan


def processor_seconds() -> float:
    """Seconds that the processor has spent for this process and those that it started."""
    return sum(os.times()[:4])


def code_lines(function: Callable) -> int:
    """The lines of a function that hold code: no docstring, no imports, no blank lines, no comments."""
    text = textwrap.dedent(inspect.getsource(function))
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.FunctionDef)
    left_out = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
    left_out += [each for each in tree.body[:1] if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)]
    numbers = {number for each in left_out for number in range(each.lineno, (each.end_lineno or each.lineno) + 1)}
    lines = [line.strip() for number, line in enumerate(text.splitlines(), start=1) if number not in numbers]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def lines_with_icl(example: ModuleType) -> int:
    """The lines of an example that make its estimate."""
    return code_lines(example.estimate) + len(getattr(example, "SWEEP", "").splitlines())


def in_memory(name: str, example: ModuleType, quick: bool) -> Iterator[Estimate]:
    """The estimates of an example that calls `estimate_llc`."""
    known = example.known() if hasattr(example, "known") else math.nan
    write = getattr(examples_by_devinterp, name)
    for step, model in example.trained(quick).items():
        started = processor_seconds()
        result: LLCResult = example.estimate(model, quick)
        config = result.config
        yield Estimate(
            step, result.llc_mean, result.llc_mcse, result.verdict.text, gradients_of(result), result.nbeta, config.localization,
            config.step_size or math.nan, config.num_chains, processor_seconds() - started, partial(write, example, model), known,
        )  # fmt: skip


def in_a_folder(example: ModuleType, quick: bool) -> Iterator[Estimate]:
    """The estimates of the example that goes through `icl llc`, in the working directory."""
    example.train()
    started = processor_seconds()
    example.estimate(quick)
    seconds = processor_seconds() - started
    (metrics,) = Path("checkpoints/icl").glob("*/metrics.jsonl")
    sampler = json.loads((metrics.parent / "config.json").read_text())["sampler_config"]
    chains, steps = sampler["num_chains"], sampler["num_burnin_steps"] + sampler["num_draws"]
    ((xs, _),) = example.batches()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        yield Estimate(
            row["step"], row["llc/mean"], row["llc/mcse"], row["verdict"], chains * steps, len(xs) / math.log(len(xs)),
            row.get("gamma", 1.0), sampler["epsilon"], chains, seconds / len(rows),
            partial(_at, row["step"], example),
        )  # fmt: skip


def _at(step: int, example: ModuleType, given: Given) -> xr.Dataset:
    return examples_by_devinterp.own_checkpoints(example, given, [step])[step]


def row_of(name: str, example: ModuleType, ours: Estimate, place: Path) -> dict[str, Any]:
    """Both estimates of one checkpoint."""
    steps = ours.gradients // ours.chains
    given = Given(ours.nbeta, ours.gamma, ours.epsilon, ours.chains, steps, place / f"{name}-{ours.step}")
    started = processor_seconds()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it prints a bar for every chain
        warnings.simplefilter("ignore")
        theirs = ours.other(given)
    return {
        "example": name, "step": ours.step, "lines_icl": lines_with_icl(example),
        "lines_devinterp": code_lines(getattr(examples_by_devinterp, name)), "nbeta": ours.nbeta, "gamma": ours.gamma,
        "epsilon": ours.epsilon, "gradients_icl": ours.gradients, "gradients_devinterp": steps * ours.chains, "known": ours.known,
        "icl": ours.value, "icl_error": ours.error, "devinterp": float(theirs.llc_mean), "devinterp_spread": float(theirs.llc_std),
        "icl_seconds": ours.seconds, "devinterp_seconds": processor_seconds() - started, "verdict": ours.verdict,
    }  # fmt: skip


@contextlib.contextmanager
def working_in(place: Path) -> Iterator[None]:
    """Work in a folder; the examples can be imported there and in the processes that they start."""
    before, searched = Path.cwd(), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), *([searched] if searched else [])])
    sys.path.insert(0, str(EXAMPLES))
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(EXAMPLES))
        del os.environ["PYTHONPATH"]
        if searched is not None:
            os.environ["PYTHONPATH"] = searched


def rows_of_example(name: str, quick: bool) -> Iterator[dict[str, Any]]:
    """The rows of one example, as they come."""
    with tempfile.TemporaryDirectory() as folder, working_in(Path(folder)):
        example = importlib.import_module(name)
        estimates = in_a_folder(example, quick) if name == "own_checkpoints" else in_memory(name, example, quick)
        for ours in estimates:
            yield row_of(name, example, ours, Path(folder))


def run(output: Path | None, quick: bool, names: Sequence[str] = NAMES) -> pd.DataFrame:
    """All rows, those that are there already included."""
    path = None if output is None else output.resolve() / "examples.csv"
    rows = pd.read_csv(path).to_dict("records") if path and path.exists() else []
    done = {row["example"] for row in rows}
    for name in (name for name in names if name not in done):
        started = processor_seconds()
        for row in rows_of_example(name, quick):
            rows.append(row)
            print(
                f"{name}, step {row['step']}: {row['lines_icl']} lines against {row['lines_devinterp']}; icl {row['icl']:.3g} ± "
                f"{row['icl_error']:.2g}, devinterp {row['devinterp']:.3g} ± {row['devinterp_spread']:.2g} over chains; {row['verdict']}",
                flush=True,
            )
            if path is not None:
                write_table(pd.DataFrame(rows), path, digits=5)
        print(f"{name}: {processor_seconds() - started:.0f} s", flush=True)
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short training and chains, for a test that it runs")
    parser.add_argument("--only", choices=NAMES, action="append", help="this example only; repeatable")
    parser.add_argument(
        "--output", type=Path, help="folder of examples.csv; default: data/llc_accuracy, with --quick none"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    output = options.output or (None if options.quick else Path("data/llc_accuracy"))
    run(output, options.quick, options.only or NAMES)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
