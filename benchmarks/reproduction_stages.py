"""What changes over the paper's stages, and where its boundaries are found: tables for docs/reproduction.md."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy.stats import t as student_t

from benchmarks.pages import markdown_table
from benchmarks.shipped_runs import Shipped
from icl.analysis.stages import PUBLISHED_STAGE_ENDS, PUBLISHED_STAGE_TYPES
from icl.llc_tables import ESTIMATES, FEWEST_ESTIMATES

# arXiv 2402.02364, table of the linear-regression stages (model seed 1).
CHANGE_OF_LOSS = {"LR1": -0.32, "LR2": -2.21, "LR3": -0.07, "LR4": -0.05, "LR5": -0.029}
CHANGE_OF_LLC = {"LR1": 21.4, "LR2": 149.0, "LR3": -12.3, "LR4": -44.1, "LR5": 3.56}
TOLERANCE, RELATIVE_TOLERANCE = 5.0, 0.15
LOG_TOLERANCE = 0.25
PUBLISHED_CHAINS = 10


def compared(target: float | None, ours: Sequence[float | None], decimals: int | None) -> tuple[str, str]:
    """Mean over the runs that have the number less the published one (or their ratio), and the standard deviation over them.

    From three runs on also the one in units of the other, and how probable it is that one more run lies at least as far from
    the mean m of the n as the published number does: |x - m| / (s √(1 + 1/n)) has Student's t with n - 1 degrees of freedom if
    runs are alike and normal. Two runs would give both by luck.
    """
    known = np.array([value for value in ours if value is not None], dtype=float)
    if target is None or not known.size:
        return "", ""
    if decimals is None:
        known, target = np.log(known), math.log(target)
    difference = float(known.mean()) - target
    shown = f"{math.exp(difference):.2f} times" if decimals is None else f"{difference:+.{decimals}f}"
    if known.size < 2:
        return shown, ""
    spread = float(known.std(ddof=1))
    if known.size > 2 and spread > 0:
        score = abs(difference) / (spread * math.sqrt(1 + 1 / known.size))
        shown += f" ({difference / spread:+.1f} spreads, p = {2 * student_t.sf(score, known.size - 1):.2g})"
    return shown, f"{math.exp(spread):.2f} times" if decimals is None else f"{spread:.{decimals}f}"


def titles(runs: Sequence[Shipped]) -> list[str]:
    """One column per run."""
    return [f"seed {run.seed}" for run in runs]


def loss_changes(runs: Sequence[Shipped]) -> str:
    """Of the evaluator's loss, beside the published ones."""
    ours = zip(*(run.loss_changes() for run in runs), strict=True)
    rows = []
    for (stage, published), checkpoints, changes in zip(CHANGE_OF_LOSS.items(), _spans(runs[0]), ours, strict=True):
        shown = [f"{change:.3f}" for change in changes]
        rows.append([stage, checkpoints, f"{published:g}", *shown, *compared(published, changes, 3)])
    return markdown_table(["stage", "checkpoints", "Δℓ published", *titles(runs), "difference", "spread"], rows)


def low_noise_losses(runs: Sequence[Shipped]) -> str:
    """The same on the reference code's validation law."""
    ours = zip(*(run.low_noise_loss_changes() for run in runs), strict=True)
    rows = [
        [stage, *(f"{change:.3f}" for change in changes)] for stage, changes in zip(CHANGE_OF_LOSS, ours, strict=True)
    ]
    return markdown_table(["stage", *titles(runs)], rows)


def _spans(run: Shipped) -> list[str]:
    """From which checkpoint to which, for each stage."""
    return [f"{start:,} to {end:,}" for start, end in pairwise(run.boundaries().values())]


def coefficient_changes(runs: Sequence[Shipped]) -> str:
    """Under the published settings, as differences of two estimates; in bold where outside the aim."""
    return _beside_published(runs, [run.llc_changes("llc") for run in runs])


def smooth_coefficient_changes(runs: Sequence[Shipped]) -> str:
    """The same from smooth fits to all estimates."""
    return _beside_published(runs, [run.smooth_llc_changes("llc") for run in runs])


def _beside_published(runs: Sequence[Shipped], each: Sequence[Mapping[str, tuple[float, float] | None]]) -> str:
    rows = []
    for stage, published in CHANGE_OF_LLC.items():
        ours = [changes[stage] for changes in each]
        cells = [_change(found) if _is_within(found, published) else f"**{_change(found)}**" for found in ours]
        compare = compared(published, [None if found is None else found[0] for found in ours], 1)
        rows.append([stage, PUBLISHED_STAGE_TYPES[stage], f"{published:+g}", *cells, *compare])
    return markdown_table(["stage", "type", "Δλ̂ published", *titles(runs), "difference", "spread"], rows)


def certainty_of_misses(runs: Sequence[Shipped]) -> str:
    """How many standard errors a miss is where both ends have as many chains as published, if theirs are as uncertain."""
    remarks: dict[str, list[str]] = {}
    for run in runs:
        chains, ends = run.needed("llc").set_index("step")["chains"], list(run.boundaries().values())
        for (stage, found), start, end in zip(run.llc_changes("llc").items(), ends, ends[1:], strict=False):
            if found is None or _is_within(found, CHANGE_OF_LLC[stage]):
                continue
            if all(chains.get(step) == PUBLISHED_CHAINS for step in (start, end)):
                errors = abs(found[0] - CHANGE_OF_LLC[stage]) / (math.sqrt(2) * found[1])
                remarks.setdefault(stage, []).append(f"{errors:.1f} in seed {run.seed}")
    if not remarks:
        return ""
    return (
        f" Where both ends have the published number of chains, {PUBLISHED_CHAINS}, and if the published estimates were as uncertain "
        f"as ours, a miss is this many standard errors of the difference: "
        + "; ".join(f"{stage} {', '.join(seeds)}" for stage, seeds in remarks.items())
        + "."
    )


def calibrated_changes(runs: Sequence[Shipped]) -> str:
    """Of λ̂ under the calibrated settings."""
    each = [run.llc_changes("llc_calibrated") for run in runs]
    rows = [[stage, *(_change(changes[stage]) for changes in each)] for stage in CHANGE_OF_LLC]
    return markdown_table(["stage", *titles(runs)], rows)


def missed(runs: Sequence[Shipped]) -> Iterator[str]:
    """Stages whose change of λ̂ under the published settings is outside the aim, with their seeds."""
    for stage, published in CHANGE_OF_LLC.items():
        seeds = [str(run.seed) for run in runs if not _is_within(run.llc_changes("llc")[stage], published)]
        if seeds:
            yield f"{stage} of seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _is_within(found: tuple[float, float] | None, published: float) -> bool:
    """Whether a change is within the aim, or not known."""
    return found is None or abs(found[0] - published) <= max(TOLERANCE, RELATIVE_TOLERANCE * abs(published))


def _change(found: tuple[float, float] | None) -> str:
    return "not sampled" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def boundaries_found(runs: Sequence[Shipped]) -> str:
    """Every boundary, and for each published one the seeds that have it."""
    curves = [
        (run, name)
        for run in runs
        for name in ESTIMATES
        if (table := run.table(name)) is not None and len(table) >= FEWEST_ESTIMATES
    ]
    if not curves:
        return f"None: there are fewer than the {FEWEST_ESTIMATES} estimates that the detector needs."
    rows, having = [], {}
    for run, name in curves:
        found = run.table("boundaries")
        for _, row in () if found is None else found[found["setting"] == name].iterrows():
            within = abs(row["log_ratio"]) <= LOG_TOLERANCE
            if within:
                having.setdefault((row["published"], name), []).append(f"{run.seed} ({row['step']:,.0f})")
            interval = f"{row['low']:,.0f} to {row['high']:,.0f}"
            nearest = f"{row['published']}, {row['published_step']:,.0f}"
            cells = [f"{row['probability']:.2f}", nearest, f"{row['log_ratio']:+.2f}", "yes" if within else "**no**"]
            rows.append([f"`{name}`, seed {run.seed}", f"{row['step']:,.0f}", interval, *cells])
    head = ["estimates", "step", "90 % interval", "probability", "nearest published end", "log ratio", "within the aim"]
    names = sorted({name for _, name in curves})
    inner = list(PUBLISHED_STAGE_ENDS.items())[:-1]  # the last end is the end of training, which no curve shows
    summary = [
        [f"{stage}, {step:,}", *(", ".join(having.get((stage, name), ["none"])) for name in names)]
        for stage, step in inner
    ]
    return (
        markdown_table(["published end", *(f"`{name}`: seeds that have it" for name in names)], summary)
        + "\n\nEvery boundary that is found:\n\n"
        + markdown_table(head, rows)
    )
