"""How cost grows with width, sequence length and chains: `python -m benchmarks.speed.scaling [--quick] [--draw]`.

Loss and gradient of one batch by the native kernel, by the library's PyTorch form and by the textbook's module, each
with two threads, in turns; and SGLD with more and more chains. Writes benchmarks/results/scaling-<device>.csv and draws
figures/benchmarks/scaling.png from it (`--draw` draws alone).
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks.speed import cases
from benchmarks.speed.machine import CORES, RESULTS, device_name, slug
from benchmarks.speed.workers import Timing, Variant, take_turns
from icl.storage.files import write_table

FIGURE = Path(__file__).parents[2] / "figures" / "benchmarks" / "scaling"
# Batches shrink as sequences cost more, so that a round stays below a second; 64 still fill every slice of the kernel.
WIDTHS = {64: 256, 128: 128, 256: 64, 512: 64}
EXAMPLES = {8: 256, 16: 128, 32: 64, 64: 64}
CHAINS = (1, 4, 10, 32, 128)


def gradients(axis: str, sizes: dict[int, int], rounds: int) -> Iterator[dict]:
    """One row per size and way: seconds per sequence, and GFLOP/s of the arithmetic that the trimmed model needs."""
    for size, batch in sizes.items():
        wide = {"embed_size": size, "mlp_size": size} if axis == "width" else {"max_examples": size}
        shape = replace(cases.PAPER, **wide)
        variants = [
            Variant(way, cases.make_gradient, [{"shape": shape, "batch": batch, "way": way}], batch, CORES)
            for way in ("textbook", "torch", "native")
        ]
        timings = take_turns(variants, rounds)
        for way, timing in timings.items():
            rate = cases.step_flops(shape, batch) / (timing.median * batch) / 1e9
            yield row(axis, size, way, timing, timings["textbook"]) | {"gflops": rate}


def chains(numbers: tuple[int, ...], rounds: int, batch: int) -> Iterator[dict]:
    """Seconds per chain-step with C chains; the baseline is the textbook, one chain after the other."""
    for number in numbers:
        steps = max(1, 32 // number)
        keywords = {"shape": cases.PAPER, "chains": number, "batch": batch, "steps": steps, "cores": CORES}
        plain = {"shape": cases.PAPER, "batch": batch, "steps": 8}
        variants = [
            Variant("textbook", cases.make_textbook_sgld, [plain], 8, CORES),
            Variant("torch", cases.make_sgld, [keywords], number * steps, CORES, compiled=False),
            Variant("native", cases.make_sgld, [keywords], number * steps, CORES),
        ]
        timings = take_turns(variants, rounds)
        for way, timing in timings.items():
            rate = cases.step_flops(cases.PAPER, batch) / timing.median / 1e9
            yield row("chains", number, way, timing, timings["textbook"]) | {"gflops": rate}


def row(axis: str, size: int, way: str, timing: Timing, baseline: Timing) -> dict:
    low, ratio, high = timing.speedup(baseline)
    return {
        "axis": axis, "size": size, "way": way, "seconds": timing.median, "speedup": ratio, "speedup_low": low, "speedup_high": high,
    }  # fmt: skip


def draw(results: pd.DataFrame) -> None:
    """Three panels, one per axis: how many times faster than the textbook, by size."""
    from icl.figures.style import MODEL, ZERO, page, panels, save

    colours = {"torch": ZERO, "native": MODEL}
    titles = {"width": "width of stream and MLP", "examples": "examples K", "chains": "chains"}
    with page():
        figure, axes = panels(1, 3, sharey=True)
        for panel, (axis, title) in zip(axes, titles.items(), strict=True):
            for way, part in results[results["axis"] == axis].groupby("way", sort=False):
                if way != "textbook":
                    panel.plot(part["size"], part["speedup"], "o-", color=colours[str(way)], label=way, markersize=3)
                    panel.fill_between(
                        part["size"],
                        part["speedup_low"],
                        part["speedup_high"],
                        color=colours[str(way)],
                        alpha=0.2,
                        lw=0,
                    )
            panel.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
            panel.set(xscale="log", xlabel=title, ylim=(0, None))
            sizes = sorted(results.loc[results["axis"] == axis, "size"].unique())
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
        axes[0].set_ylabel("times as fast as the textbook")
        axes[0].legend()
        save(figure, FIGURE.parent, FIGURE.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes, to see that it runs; nothing is written"
    )
    parser.add_argument("--draw", action="store_true", help="draw the figure from the results; time nothing")
    arguments = parser.parse_args()
    name = device_name()
    path = RESULTS / f"scaling-{slug(name)}.csv"
    if arguments.draw:
        draw(pd.read_csv(path))
        return
    if arguments.quick:
        rows = [*gradients("width", {16: 8}, 1), *gradients("examples", {4: 8}, 1), *chains((2,), 1, 16)]
    else:
        rows = [*gradients("width", WIDTHS, 5), *gradients("examples", EXAMPLES, 5), *chains(CHAINS, 3, 256)]
    results = pd.DataFrame(rows)
    print(results.to_string(index=False, float_format="%.4g"))
    if not arguments.quick:
        write_table(results.assign(device=name), path, digits=6)
        draw(results)


if __name__ == "__main__":
    main()
