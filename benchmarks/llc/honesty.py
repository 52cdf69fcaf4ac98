"""Whether a verdict of "healthy" is to be trusted: estimates by sound and by bad settings against values that are known.

    python -m benchmarks.llc.honesty [--quick | --summarise | --fresh 10] [--output data/llc_accuracy] [--figures figures/llc_accuracy]

Every estimate is compared with nβ (E[L] − L(w*)) at its nβ and γ, with w* the minimum: exact for linear regression, by quadrature for
normal crossings, by weighted draws for warped models, else that of one long run of many chains with a quarter of the step
(honesty_reference.csv). With γ = 1e5, which is no question about the model, it is compared with the value at the model's own γ. An estimate
is **wrong** if it is off by more than 10 % and by more than two of its standard errors. Whether setting and budget are **sound** is said
without looking at the estimate (`benchmarks.llc.cases.is_sound`). A sound estimate that is not wrong and not healthy is a **false alarm**
if a test failed, and **undecided** if none did but some were too noisy to say.

`--fresh N` repeats the default settings with N seeds that the verdicts were never tried on (honesty_fresh.csv.gz), for the share of
false alarms of a whole verdict.

Rows are appended to honesty.csv.gz as they come, and rows already there are not made again.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from benchmarks.llc.cases import Case, cases, is_sound
from benchmarks.llc.targets import Target
from icl.figures.llc_accuracy import honesty
from icl.figures.style import save
from icl.sampling import AUTOMATIC
from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.result import LLCResult
from icl.storage.files import write_table

TOLERANCE = 0.1
FRESH = 1000
"""The first of the fresh seeds."""
LONG = {"num_chains": 48, "num_draws": 4000, "num_burnin_steps": 1500}


@dataclass(frozen=True)
class Reference:
    """What is known of a model: λ_max of its potential, its γ (None: the setting's), and its value there if it took a run."""

    curvature: float
    gamma: float | None = None
    value: float = math.nan
    error: float = 0.0


class References:
    """The models' references, kept in a file."""

    def __init__(self, path: Path, quick: bool) -> None:
        self._path, self._long = path, {"num_chains": 4, "num_draws": 50} if quick else LONG
        self._rows = pd.read_csv(path).to_dict("records") if path.exists() else []

    def of(self, target: Target) -> Reference:
        """By theory, or by a run of its own."""
        if target.curvatures is not None:
            nbeta = target.num_samples / math.log(target.num_samples)
            return Reference(nbeta * float(target.curvatures.max()) + 1.0)
        row = next((row for row in self._rows if row["model"] == target.name), None)
        if row is None:
            row = self._made(target)
            self._rows.append(row)
            write_table(pd.DataFrame(self._rows), self._path, digits=6)
        return Reference(row["curvature"], row["gamma"], row["value"], row["error"])

    def _made(self, target: Target) -> dict:
        pilot = AUTOMATIC.model_copy(
            update={"num_draws": 50, "eval_dataset_size": target.num_samples, "target_error": None}
        )
        objective, inputs = target.at(0.0), Inputs(target.batches(None))
        first = estimate_llc_of(objective, inputs, pilot)
        assert first.tuned is not None
        assert first.config.epsilon is not None
        row = {"model": target.name, "curvature": first.tuned.curvature, "gamma": first.tuned.gamma}
        if target.exact is not None:
            value = target.exact(first.nbeta, first.tuned.gamma)
            return row | {"value": value, "error": 0.0, "verdict": "exact"}
        config = first.config.model_copy(update={**self._long, "epsilon": first.config.epsilon / 4})
        result = estimate_llc_of(objective, inputs, config)
        return row | {"value": result.llc_mean, "error": result.llc_mcse, "verdict": result.verdict.text}


def run_case(case: Case, references: References) -> dict:
    """One row."""
    target = case.target()
    known = references.of(target)
    config = case.config(target, known.gamma, known.curvature)
    started = time.process_time()
    result = estimate_llc_of(target.at(case.off), Inputs(target.batches(case.batch)), config)
    seconds = time.process_time() - started
    exact = known.value
    if target.curvatures is not None:
        assert target.exact is not None
        exact = target.exact(result.nbeta, 1.0 if case.kind == "localisation 1e5" else result.config.localization)
    difference = abs(result.llc_mean - exact)
    wrong = not difference <= max(TOLERANCE * exact, 2 * result.llc_mcse)
    return {
        "key": case.key, "model": case.name, "family": target.family, "kind": case.kind, "batch": case.batch or 0,
        "sound": is_sound(case, result.config, target), "exact": exact, "estimate": result.llc_mean, "mcse": result.llc_mcse,
        "healthy": result.verdict.trusted, "wrong": wrong, "within_10_percent": difference <= TOLERANCE * exact,
        "gradients": gradients_of(result), "seconds": seconds, "stiff": result.evidence.stiff.value,
        "virial": result.evidence.virial.value, "verdict": result.verdict.text,
    }  # fmt: skip


def gradients_of(result: LLCResult) -> int:
    """Gradients spent: of the chains, of their tests, and of the pilot."""
    config, tested = result.config, result.run.stiff.numel()
    steps = config.num_burnin_steps + result.run.losses.shape[1] * config.num_steps_bw_draws
    return config.num_chains * steps + 2 * tested + (result.tuned.gradients if result.tuned else 0)


def fresh(seeds: int) -> list[Case]:
    """The default settings with seeds of their own."""
    first = [case for case in cases() if case.kind in ("default", "default, mini-batches") and case.seed == 0]
    return [replace(case, seed=FRESH + seed) for seed in range(seeds) for case in first]


def run(chosen: Sequence[Case], output: Path, quick: bool, name: str = "honesty") -> pd.DataFrame:
    """All rows, those that are there already included."""
    path = output / f"{name}.csv.gz"
    references = References(output / "honesty_reference.csv", quick)
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    wanted = {case.key for case in chosen}
    rows = [row for row in rows if row["key"] in wanted]
    done = {row["key"] for row in rows}
    rest = [case for case in chosen if case.key not in done]
    started = time.monotonic()
    for place, case in enumerate(rest):
        row = run_case(case, references)
        rows.append(row)
        write_table(pd.DataFrame(rows), path, digits=5)
        left = (time.monotonic() - started) / (place + 1) * (len(rest) - place - 1)
        mark = _remark(row)
        print(
            f"{place + 1}/{len(rest)} {left:5.0f} s left  {mark}{case.kind}: {case.key}: {row['estimate']:.3g} ± {row['mcse']:.2g} "
            f"for {row['exact']:.3g}: {row['verdict']}",
            flush=True,
        )
    return pd.DataFrame(rows)


def _remark(row: dict) -> str:
    if row["wrong"] and row["healthy"]:
        return "WRONG AND HEALTHY "
    return "sound, not healthy " if row["sound"] and not row["healthy"] else ""


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares for all cases, by family and by kind of setting."""
    # A verdict names what failed before what was not tested.
    alarm = ~rows["healthy"] & ~rows["verdict"].str.startswith("not tested")
    rows = rows.assign(alarm=alarm, undecided=~rows["healthy"] & ~alarm)

    def one(group: pd.DataFrame) -> pd.Series:
        sound = group[group["sound"]]
        right = sound[~sound["wrong"]]
        return pd.Series({
            "cases": len(group), "wrong": group["wrong"].mean(), "wrong_and_healthy": (group["wrong"] & group["healthy"]).mean(),
            "sound": len(sound), "sound_healthy_within_10_percent": (sound["healthy"] & sound["within_10_percent"]).mean(),
            "false_alarms": right["alarm"].mean(), "undecided": right["undecided"].mean(),
        })  # fmt: skip

    parts = [
        rows.assign(of="all", group="all"),
        rows.assign(of="family", group=rows["family"]),
        rows.assign(of="kind", group=rows["kind"]),
    ]
    grouped = pd.concat(parts).groupby(["of", "group"], sort=False)[list(rows.columns)].apply(one)
    return grouped.reset_index()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="four cases, for a test that it runs")
    parser.add_argument(
        "--summarise", action="store_true", help="only from the rows that are there: nothing is sampled"
    )
    parser.add_argument(
        "--fresh", type=int, metavar="N", help="the default settings with N fresh seeds, for false alarms"
    )
    parser.add_argument("--output", type=Path, default=Path("data/llc_accuracy"))
    parser.add_argument("--figures", type=Path, default=Path("figures/llc_accuracy"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    name = "honesty" if options.fresh is None else "honesty_fresh"
    kept = options.output / f"{name}.csv.gz"
    chosen = cases(options.quick) if options.fresh is None else fresh(options.fresh)
    rows = pd.read_csv(kept) if options.summarise else run(chosen, options.output, options.quick, name)
    summary = summarise(rows)
    write_table(summary, options.output / f"{name}_summary.csv", digits=4)
    print(summary.to_string(index=False, float_format="%.3f"))
    if options.fresh is not None:
        return 0
    for path in save(honesty(rows), options.figures, "honesty"):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
