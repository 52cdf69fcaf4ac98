"""How fast, as ratios against a textbook in the same run: `python -m benchmarks.speed [--quick] [--only SECTION ...]`.

One table is printed and written to benchmarks/results/: `speed-<device>.csv`, and README.md there is made from all of
them (`python -m benchmarks.speed --table` makes it alone).

The baseline of every section is PyTorch as a tutorial would write it (`benchmarks.speed.textbook`), with two threads
where there are two cores. What each row does is in `benchmarks.speed.cases`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import pandas as pd

from benchmarks.speed import cases
from benchmarks.speed.machine import CORES, RESULTS, device_name, slug
from benchmarks.speed.table import SHOWN, markdown, write_pages
from benchmarks.speed.workers import Timing, Variant, take_turns
from icl.storage.files import write_table


def training(quick: bool) -> Iterator[dict]:
    """A training step per seed at B = 256; the baseline, and the share of the measured peak."""
    shape, batch, steps = cases.PAPER, 32 if quick else 256, 2 if quick else 12

    def icl(compiled: bool, total: int, spread: bool) -> Variant:
        """`total` seeds, one after the other in one process, or spread over one-thread workers."""
        count = steps * (4 if total == 1 else 1)  # a round should last some tenths of a second
        seeds = shares(total, CORES) if spread else [total]
        keywords = [{"shape": shape, "seeds": share, "batch": batch, "steps": count} for share in seeds]
        layout = "a worker per core" if spread else "one process"
        name = f"{'native' if compiled else 'no compiler'}, E = {total}, {layout}"
        return Variant(name, cases.make_training, keywords, total * count, 1 if spread else CORES, compiled)

    textbook = {"shape": shape, "batch": batch, "steps": steps}
    size, repeats = (64, 2) if quick else (1024, 12)
    variants = [
        Variant("textbook", cases.make_textbook_training, [textbook], steps, CORES),
        *(icl(True, total, spread) for total, spread in ((1, False), (5, False), (10, False), (5, True), (10, True))),
        *(icl(False, total, spread) for total, spread in ((1, False), (10, True))),
        Variant("sgemm", cases.make_sgemm, [{"size": size, "repeats": repeats}], 2 * size**3 * repeats, CORES),
    ]
    timings = take_turns(variants, rounds(quick, 7))
    peak = timings.pop("sgemm")
    yield row("sgemm", "peak", "peak", peak, None, f"{1 / peak.median / 1e9:.0f} GFLOP/s")
    flops = cases.step_flops(shape, batch)
    for name, timing in timings.items():
        share = [peak_s * flops / own for own, peak_s in zip(timing.seconds, peak.seconds, strict=True)]
        note = f"{100 * sorted(share)[len(share) // 2]:.0f} % of sgemm"
        yield row("training step, B = 256", "seed-step", name, timing, timings["textbook"], note)


def sampling(quick: bool) -> Iterator[dict]:
    """An SGLD step per chain at B = 1024."""
    shape, batch, steps = cases.PAPER, 32 if quick else 1024, 2 if quick else 6

    def icl(chains: int, compiled: bool) -> Variant:
        count = steps * (4 if chains == 1 else 1)
        keywords = {"shape": shape, "chains": chains, "batch": batch, "steps": count, "cores": CORES}
        name = f"{'native' if compiled else 'no compiler'}, C = {chains}"
        return Variant(name, cases.make_sgld, [keywords], chains * count, CORES, compiled)

    plain = {"shape": shape, "batch": batch, "steps": steps}
    variants = [
        Variant("textbook", cases.make_textbook_sgld, [plain], steps, CORES),
        Variant("devinterp", cases.make_devinterp_sgld, [plain | {"steps": 2 * steps}], 2 * steps, CORES),
        *(icl(chains, compiled) for compiled in (True, False) for chains in (1, 4, 10)),
    ]
    timings = take_turns(variants, rounds(quick, 4))
    for name, timing in timings.items():
        against = timing.speedup(timings["devinterp"])[1]
        note = f"{against:.2f} x devinterp" if name != "devinterp" else ""
        yield row("SGLD step, B = 1024", "chain-step", name, timing, timings["textbook"], note)


def baselines(quick: bool) -> Iterator[dict]:
    """Ridge and dMMSE predictions of 1024 sequences."""
    variants = [
        Variant("textbook", cases.make_ridge, [{"plain": True, "batch": 1024}], 1, CORES),
        Variant("icl", cases.make_ridge, [{"plain": False, "batch": 1024}], 1, CORES),
    ]
    timings = take_turns(variants, rounds(quick, 9))
    for name, timing in timings.items():
        yield row("ridge, B = 1024", "batch of 1024", name, timing, timings["textbook"], "")
    # The plain loop holds (B, K, M) numbers: where they would not fit, fewer sequences are timed, and scaled to 1024.
    for num_tasks, batch in (
        ((64, 1024), (4096, 1024)) if quick else ((64, 1024), (4096, 1024), (2**16, 64), (2**20, 16))
    ):
        # The library's own memory does not grow: it may see more sequences, which cost it no less each.
        variants = [
            Variant(name, cases.make_dmmse, [keywords], keywords["batch"] / 1024, CORES, name != "no compiler")
            for name, keywords in (
                ("textbook", {"plain": True, "batch": batch, "num_tasks": num_tasks}),
                ("native", {"plain": False, "batch": batch, "num_tasks": num_tasks}),
                ("no compiler", {"plain": False, "batch": batch, "num_tasks": num_tasks}),
            )
        ]
        timings = take_turns(variants, rounds(quick, 5 if num_tasks < 2**16 else 3))
        scaled = "" if batch == 1024 else f"timed on {batch} sequences and scaled"
        for name, timing in timings.items():
            yield row(f"dMMSE, M = {num_tasks}, B = 1024", "batch of 1024", name, timing, timings["textbook"], scaled)


def checkpoints(quick: bool) -> Iterator[dict]:
    """One checkpoint of the paper's model; the baseline is torch.save and torch.load, which neither check nor flush."""
    count = 2 if quick else 20
    for what, make in (("write", cases.make_checkpoint_write), ("load", cases.make_checkpoint_load)):
        variants = [
            Variant("torch", make, [{"plain": True, "count": count}], count),
            Variant("icl", make, [{"plain": False, "count": count}], count),
        ]
        timings = take_turns(variants, rounds(quick, 7))
        for name, timing in timings.items():
            note = "checksum, flushed to disk, renamed" if (name, what) == ("icl", "write") else ""
            yield row(f"checkpoint {what}", "checkpoint", name, timing, timings["torch"], note)


def demo(quick: bool) -> Iterator[dict]:
    """`icl demo --quick` from start to finish."""
    yield from time_demo(short=True)


def full_demo(quick: bool) -> Iterator[dict]:
    """`icl demo` from start to finish."""
    yield from time_demo(short=quick)


def time_demo(short: bool) -> Iterator[dict]:
    """The baseline is the demo's gradient steps alone, at the textbook's pace."""
    from icl.commands.demo import demo_config

    config = demo_config(short)
    sampler = config.sampler_config
    estimates = len(config.chosen_steps(config.training.checkpoint_steps()))
    steps = config.training.num_steps + estimates * sampler.num_chains * sampler.num_steps
    keywords = {"shape": cases.PAPER, "batch": 256, "steps": 12}
    plain = Variant("textbook", cases.make_textbook_training, [keywords], 12, CORES)
    before = take_turns([plain], 5)["textbook"]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "icl", "demo", "--output", folder, *(["--quick"] if short else [])]
        start = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, "DEVICE": "cpu"})
        seconds = time.perf_counter() - start
    after = take_turns([plain], 5)["textbook"]
    pace = (before.median + after.median) / 2
    name = f"demo{' --quick' if short else ''}, end to end"
    textbook = Timing("textbook", [pace * steps])
    yield row(name, "demo", "textbook", textbook, textbook, f"{steps:,} gradient steps alone")
    yield row(name, "demo", "icl", Timing("icl", [seconds]), textbook, "with evaluation, checkpoints and figures")


SECTIONS: dict[str, Callable[[bool], Iterator[dict]]] = {
    "training": training, "sampling": sampling, "baselines": baselines, "checkpoints": checkpoints, "demo": demo,
    "full-demo": full_demo,
}  # fmt: skip


def shares(total: int, workers: int) -> list[int]:
    """`total` spread over workers, larger shares first."""
    return [total // workers + (index < total % workers) for index in range(workers)]


def rounds(quick: bool, full: int) -> int:
    return 2 if quick else full


def row(section: str, unit: str, variant: str, timing: Timing, baseline: Timing | None, note: str) -> dict:
    """One row of the table: seconds per unit, and how many times faster than the baseline, with quartiles."""
    low, high = timing.quartiles
    ratio_low, ratio, ratio_high = timing.speedup(baseline) if baseline else (float("nan"),) * 3
    return {
        "section": section, "variant": variant, "unit": unit, "seconds": timing.median, "seconds_low": low, "seconds_high": high,
        "speedup": ratio, "speedup_low": ratio_low, "speedup_high": ratio_high, "rounds": len(timing.seconds), "note": note,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; nothing is written")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=[name for name in SECTIONS if name != "full-demo"]
    )
    parser.add_argument("--table", action="store_true", help="make the README's table from the results; time nothing")
    arguments = parser.parse_args()
    if arguments.table:
        write_pages(RESULTS)
        return
    name = device_name()
    path = RESULTS / f"speed-{slug(name)}.csv"
    table = pd.DataFrame()
    for section in arguments.only:
        new = pd.DataFrame(SECTIONS[section](arguments.quick)).assign(device=name)
        print(markdown(new, SHOWN), flush=True)
        table = pd.concat([table, new])
    if not arguments.quick:
        kept = pd.read_csv(path, keep_default_na=False, na_values=["nan"]) if path.exists() else pd.DataFrame()
        if len(kept):
            kept = pd.DataFrame(kept[~kept["section"].isin(list(table["section"]))])
        write_table(pd.concat([kept, table]), path, digits=6, missing="nan")
        write_pages(RESULTS)


if __name__ == "__main__":
    main()
