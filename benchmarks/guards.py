"""What the checks of files, settings, claims and signals cost a run, against another commit.

    git worktree add /tmp/before 9aa3abb
    python -m benchmarks.guards /tmp/before

Both commits train the paper's transformer, by turns, each into a folder of its own. What counts is the processor time of
the process (user and system), because the time on the clock tells more of the neighbours. The first round, in which
kernels are compiled, is left out. What is printed at the end is the table of docs/speed.md: medians over the rounds, and
the median of the rounds' ratios with its standard error, 1.25 times the standard deviation over the root of their number.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
SWEEP = HERE / "sweeps/training-runs/quick.yaml"


def seconds_of(checkout: Path, steps: int) -> float:
    """Processor seconds of one training run by the code of a checkout."""
    with tempfile.TemporaryDirectory() as root:
        environ = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "LOCAL_ROOT": root,
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }
        command = [sys.executable, "-W", "ignore", "-m", "icl", "train", str(SWEEP), "--index", "0", "--jobs", "1"]
        process = subprocess.Popen(
            [*command, "--set", f"num_steps={steps}"], env=environ, cwd=root, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{checkout} does not train: {' '.join(command)}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the seconds of both and the ratio, round by round and in the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a run (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, two at least (default: 5)")
    parser.add_argument("--quick", action="store_true", help="two rounds of 200 steps: does it run at all")
    parser.add_argument("--minutes", type=float, default=5.0, help="no round begins that would end later (default: 5)")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.rounds = 200, 2
    pairs: dict[str, list[tuple[float, float]]] = {"start, with one step": [], f"run of {given.steps} steps": []}
    begin = time.monotonic()
    for number in range(given.rounds + 1):
        spent_s = time.monotonic() - begin
        if number > 2 and spent_s * (number + 1) / number > 60 * given.minutes:
            break
        for what, steps in zip(pairs, (1, given.steps), strict=True):
            order = [given.before.resolve(), HERE][:: 1 if number % 2 else -1]
            spent = {checkout: seconds_of(checkout, steps) for checkout in order}
            if number:
                pairs[what].append((spent[given.before.resolve()], spent[HERE]))
                line = f"{what}: {pairs[what][-1][0]:.2f} s before, {pairs[what][-1][1]:.2f} s now"
                print(line, file=sys.stderr, flush=True)
    starts, runs = pairs.values()
    steps = [(run[0] - start[0], run[1] - start[1]) for start, run in zip(starts, runs, strict=True)]
    print("| processor time | before, s | now, s | difference, s | ratio |\n|---|---|---|---|---|")
    for what, found in {**pairs, "its steps alone": steps}.items():
        print(row(what, found))


def row(what: str, found: list[tuple[float, float]]) -> str:
    """A line of the table: medians of both and of their ratio."""
    before, now = (statistics.median(column) for column in zip(*found, strict=True))
    ratios = [after / first for first, after in found]
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
    ratio = f"{statistics.median(ratios):.3f} ± {error:.3f}"
    return f"| {what} | {before:.2f} | {now:.2f} | {now - before:+.2f} | {ratio} |"


if __name__ == "__main__":
    main()
