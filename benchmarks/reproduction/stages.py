"""What changes over the paper's stages, and where its boundaries are found: tables for docs/reproduction.md."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.stats import t as student_t

from benchmarks.pages import markdown_table
from benchmarks.reproduction.shipped import Change, Changes, Shipped
from icl.analysis.stages import PUBLISHED_STAGE_ENDS, PUBLISHED_STAGE_TYPES
from icl.estimation.tables import ESTIMATES, FEWEST_ESTIMATES
from icl.figures.elements import FIRST_STEP

# arXiv 2402.02364, table of the linear-regression stages (model seed 1).
CHANGE_OF_LOSS = {"LR1": -0.32, "LR2": -2.21, "LR3": -0.07, "LR4": -0.05, "LR5": -0.029}
CHANGE_OF_LLC = {"LR1": 21.4, "LR2": 149.0, "LR3": -12.3, "LR4": -44.1, "LR5": 3.56}
TOLERANCE, RELATIVE_TOLERANCE = 5.0, 0.15
LOG_TOLERANCE = 0.25
PUBLISHED_NBETA = 66.7
CERTAIN = 0.95


def compared(
    target: float | None, ours: Sequence[float | None], decimals: int, independent: bool = True
) -> tuple[str, str]:
    """Mean over the runs that have the number less the published one, and the standard deviation over them.

    From three runs on also the one in units of the other, and for independent runs how probable it is that one more run lies at
    least as far from the mean m of the n as the published number does: |x - m| / (s √(1 + 1/n)) has Student's t with n - 1
    degrees of freedom if runs are alike and normal. Two runs would give both by luck.
    """
    known = np.array([value for value in ours if value is not None], dtype=float)
    if target is None or not known.size:
        return "", ""
    difference = float(known.mean()) - target
    shown = f"{difference:+.{decimals}f}"
    if known.size < 2:
        return shown, ""
    spread = float(known.std(ddof=1))
    if known.size > 2 and spread > 0:
        score = abs(difference) / (spread * math.sqrt(1 + 1 / known.size))
        probability = f", p = {2 * student_t.sf(score, known.size - 1):.2g}" if independent else ""
        shown += f" ({difference / spread:+.1f} spreads{probability})"
    return shown, f"{spread:.{decimals}f}"


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
    return [f"{start:,} to {end:,}" for start, end in run.spans()]


def coefficient_changes(runs: Sequence[Shipped], changes_of: Callable[[Shipped], Changes]) -> str:
    """Of λ̂ under the published settings, beside the published ones."""
    each = [changes_of(run) for run in runs]
    rows = []
    for stage, published in CHANGE_OF_LLC.items():
        ours = [changes[stage] for changes in each]
        cells = [_judged(change, published) for change in ours]
        values = [None if change is None else change.value for change in ours]
        # All seeds were sampled with one init_seed: their chains share noise.
        compare = compared(published, values, 1, independent=False)
        rows.append([stage, PUBLISHED_STAGE_TYPES[stage], f"{published:+g}", *cells, *compare])
    return markdown_table(["stage", "type", "Δλ̂ published", *titles(runs), "difference", "spread"], rows)


def calibrated_changes(runs: Sequence[Shipped]) -> str:
    """Of λ̂ under the calibrated settings."""
    each = [run.llc_changes("llc_calibrated") for run in runs]
    rows = [[stage, *(_change(changes[stage]) for changes in each)] for stage in CHANGE_OF_LLC]
    return markdown_table(["stage", *titles(runs)], rows)


def kinds(runs: Sequence[Shipped]) -> str:
    """The kinds of the stages that smooth fits show, with their probabilities, under both settings."""
    rows = []
    for name in ESTIMATES:
        for stage, published in PUBLISHED_STAGE_TYPES.items():
            found = [run.kinds(name).get(stage) for run in runs]
            cells = ["not sampled" if kind is None else _kind(*kind, published) for kind in found]
            rows.append([f"`{name}`", stage, published, *cells])
    return markdown_table(["estimates", "stage", "published", *titles(runs)], rows)


def _kind(kind: str, probability: float, published: str) -> str:
    if probability < CERTAIN:
        return f"undecided ({kind} {probability:.2f})"
    return kind if kind == published else f"**{kind}**"


def implied_changes() -> str:
    """What the paper's own changes of loss make of λ̂ if the chains' loss stays what it is: -nβ Δℓ."""
    return "; ".join(
        f"{stage} {-PUBLISHED_NBETA * change:+.1f} (published {CHANGE_OF_LLC[stage]:+g})"
        for stage, change in CHANGE_OF_LOSS.items()
    )


def missed(runs: Sequence[Shipped]) -> Iterator[str]:
    """Stages whose change of λ̂ under the published settings is not within the aim, with their seeds."""
    for stage, published in CHANGE_OF_LLC.items():
        for result in ("outside", "undecided", "chains disagree"):
            seeds = [str(run.seed) for run in runs if outcome(run.llc_changes("llc")[stage], published) == result]
            if seeds:
                yield f"{stage} of seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} ({result})"


def outcome(change: Change | None, published: float) -> str:
    """Whether a change is within the aim or outside it by two standard errors, or neither."""
    if change is None:
        return "not sampled"
    if change.disagree:
        return "chains disagree"
    aim, miss = max(TOLERANCE, RELATIVE_TOLERANCE * abs(published)), abs(change.value - published)
    if miss - 2 * change.error > aim:
        return "outside"
    return "within" if miss + 2 * change.error <= aim else "undecided"


def _judged(change: Change | None, published: float) -> str:
    marks = {"outside": "**{}**", "undecided": "{} ?", "chains disagree": "{} †"}
    return marks.get(outcome(change, published), "{}").format(_change(change))


def _change(change: Change | None) -> str:
    if change is None:
        return "not sampled"
    return f"{change.value:+.1f} ± {change.error:.1f}"


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
    counts = {name: [0, 0] for name in ESTIMATES}
    for run, name in curves:
        found = run.table("boundaries")
        for _, row in () if found is None else found[found["setting"] == name].iterrows():
            within = abs(row["log_ratio"]) <= LOG_TOLERANCE
            counts[name] = [counts[name][0] + within, counts[name][1] + 1]
            if within:
                having.setdefault((row["published"], name), []).append(f"{run.seed} ({row['step']:,.0f})")
            interval = f"{row['low']:,.0f} to {row['high']:,.0f}"
            nearest = f"{row['published']}, {row['published_step']:,.0f}"
            holds = "yes" if row["low"] <= row["published_step"] <= row["high"] else "no"
            cells = [
                f"{row['probability']:.2f}",
                nearest,
                f"{row['log_ratio']:+.2f}",
                "yes" if within else "**no**",
                holds,
            ]
            rows.append([f"`{name}`, seed {run.seed}", f"{row['step']:,.0f}", interval, *cells])
    head = ["estimates", "step", "90 % interval", "probability", "nearest published end", "log ratio", "within the aim"]
    names = sorted({name for _, name in curves})
    inner = list(PUBLISHED_STAGE_ENDS.items())[:-1]  # the last end is the end of training, which no curve shows
    summary = [
        [f"{stage}, {step:,}", *(", ".join(having.get((stage, name), ["none"])) for name in names)]
        for stage, step in inner
    ]
    places = np.geomspace(FIRST_STEP, max(PUBLISHED_STAGE_ENDS.values()), 10_000)
    chance = np.mean([any(abs(math.log(place / step)) <= LOG_TOLERANCE for _, step in inner) for place in places])
    hits = " and ".join(f"{within} of {number} (`{name}`)" for name, (within, number) in counts.items())
    return (
        markdown_table(["published end", *(f"`{name}`: seeds that have it" for name in names)], summary)
        + f"\n\nWithin the aim are {hits} of the boundaries found; a step drawn uniformly in log t from {FIRST_STEP} on is with "
        + f"probability {chance:.2f}."
        + "\n\nEvery boundary that is found:\n\n"
        + markdown_table([*head, "interval holds it"], rows)
    )
