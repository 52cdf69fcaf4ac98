"""Processor time and errors of the known-coefficient benchmark, against another commit.

    git worktree add /tmp/before 9aa3abb
    python -m benchmarks.llc.cost_before /tmp/before [--every 1] [--seeds 3]

Both commits run their own default (`AUTOMATIC`, pilot and tests included) on the models of `benchmarks.llc.accuracy`, by turns, model by
model, each in a process of its own. Only the estimate counts, in processor seconds, because the time on the clock tells more of the
neighbours. The two large networks are left out; they take most of an hour. The errors are those of several seeds of the chains, so that
their medians differ less by chance.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from benchmarks.llc import NUM_SAMPLES
from benchmarks.llc.accuracy import zoo
from icl.storage.files import write_table

HERE = Path(__file__).parents[2]
LARGEST = 3000

# It must run under both commits, so it names only what both have.
CHILD = """
import json, sys, time
import torch
from icl.sampling import AUTOMATIC, truth
from icl.sampling.llc import estimate_llc_of
try:
    from icl.sampling.llc import Inputs
except ImportError:
    Inputs = list
torch.set_num_threads(1)
function, arguments = json.loads(sys.argv[1])
model = getattr(truth, function)(*arguments)
default = AUTOMATIC.model_copy(update={"eval_dataset_size": int(sys.argv[3])})
short = default.model_copy(update={"num_draws": 20, "num_burnin_steps": 5})
estimate_llc_of(model.objective(), Inputs([model.batch]), short)
start, estimates = time.process_time(), []
for seed in range(int(sys.argv[2])):
    config = default.model_copy(update={"init_seed": seed})
    estimates.append(estimate_llc_of(model.objective(), Inputs([model.batch]), config).llc_mean)
print(json.dumps([(time.process_time() - start) / len(estimates), estimates]))
"""


def recipe(name: str, family: str) -> tuple[str, list]:
    """How `icl.sampling.truth` makes a model again, from its name in the zoo; its seed does not matter for the time."""
    if family in ("reduced-rank regression", "deep linear network"):
        sizes, rank = name.split(" rank ")
        return "deep_linear", [[int(size) for size in sizes.split("-")], int(rank), 0]
    kind, size = name.split()[:2]
    return f"{kind}_regression", [int(size), 0]


def estimated(checkout: Path, made: tuple[str, list], seeds: int) -> tuple[float, list[float]]:
    """Processor seconds of one estimate by the code of a checkout, and the estimates."""
    environ = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(made), str(seeds), str(NUM_SAMPLES)]
    run = subprocess.run(command, env=environ, cwd=checkout, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{checkout} cannot estimate {made}: {run.stderr[-500:]}")
    return tuple(json.loads(run.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--every", type=int, default=1, help="only every n-th model")
    parser.add_argument("--seeds", type=int, default=3, help="estimates of each model")
    parser.add_argument("--output", type=Path, help="folder of cost_before.csv; default: only printed")
    options = parser.parse_args(arguments)
    models = [each for each in zoo() if each.num_parameters <= LARGEST and "crossing" not in each.family][
        :: options.every
    ]
    rows = []
    for number, model in enumerate(models):
        made = recipe(model.name, model.family)
        order = [options.before.resolve(), HERE][:: 1 if number % 2 else -1]
        found = {checkout: estimated(checkout, made, options.seeds) for checkout in order}
        (before, old), (now, new) = found[options.before.resolve()], found[HERE]
        errors = (median(abs(each / model.coefficient - 1) for each in side) for side in (old, new))
        row = {
            "model": model.name,
            "parameters": model.num_parameters,
            "before_s": before,
            "now_s": now,
            "ratio": now / before,
        }
        rows.append(row | dict(zip(("error_before", "error_now"), errors, strict=True)))
        print(rows[-1], file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    print(
        f"seconds: sum {table['now_s'].sum() / table['before_s'].sum():.2f} times, median {table['ratio'].median():.2f}"
    )
    for side in ("before", "now"):
        errors = table[f"error_{side}"]
        print(f"error {side}: median {errors.median():.2%}, 90th percentile {errors.quantile(0.9):.2%}")
    if options.output:
        write_table(table, options.output / "cost_before.csv", digits=4)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
