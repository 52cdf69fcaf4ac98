"""The sections on the stages: how the loss and λ̂ change over them, and of which type they are."""

from collections.abc import Sequence

from benchmarks.pages import markdown_table
from benchmarks.reproduction import published
from benchmarks.reproduction.changes import (
    Changes,
    late_llc_changes,
    llc_changes,
    loss_changes,
    low_noise_loss_changes,
    smooth_llc_changes,
    types,
)
from benchmarks.reproduction.comparison import HEAD, Change, Comparison
from benchmarks.reproduction.shipped import Shipped, titles
from icl.analysis.stages import PUBLISHED_STAGE_ENDS, PUBLISHED_STAGE_TYPES
from icl.estimation.tables import ESTIMATES

STAGES = tuple(PUBLISHED_STAGE_ENDS)
CERTAIN = 0.95
"""The smallest share of a fit's posterior draws that settles a type."""

HEAD_OF_CHANGES = HEAD[:-1]
"""Changes of λ̂ have no p: all seeds were sampled with one init_seed, so that their chains share noise."""

PerStage = dict[str, Comparison]


def facts(runs: Sequence[Shipped]) -> dict[str, object]:
    """What the placeholders of the sections stand for."""
    losses = _per_stage([loss_changes(run) for run in runs], published.CHANGE_OF_LOSS)
    low_noise = _per_stage([low_noise_loss_changes(run) for run in runs])
    every = {
        "llc": [llc_changes(run) for run in runs],
        "late": [late_llc_changes(run) for run in runs],
        "smooth": [smooth_llc_changes(run) for run in runs],
    }
    compared = {name: _compared(changes) for name, changes in every.items()}
    outcomes = _outcomes(every["llc"], runs)
    worst = max(STAGES, key=lambda stage: abs(losses[stage].in_spreads))
    return {
        "end": PUBLISHED_STAGE_ENDS,
        "loss": losses,
        "largest_miss": losses[worst],
        "largest_miss_stage": worst,
        "most_spreads": abs(losses[worst].in_spreads),
        **compared,
        "errors": {stage: Comparison(None, [changes[stage].error for changes in every["llc"]]) for stage in STAGES},
        "outcomes": outcomes,
        "within": {stage: len(each.get("within", [])) for stage, each in outcomes.items()},
        "implied": _implied(),
        "summary": _summary(losses, compared["llc"], outcomes, len(runs)),
        "losses_table": _losses_table(losses, runs),
        "low_noise_table": _low_noise_table(low_noise, runs),
        "implied_table": _implied_table(),
        **{f"{name}_table": _changes_table(changes, runs) for name, changes in every.items()},
        **_types(runs),
    }


def _per_stage(changes: Sequence[Sequence[float]], targets: dict[str, float] | None = None) -> PerStage:
    """From one list per run to one comparison per stage."""
    each = zip(STAGES, zip(*changes, strict=True), strict=True)
    return {stage: Comparison(targets[stage] if targets else None, values) for stage, values in each}


def _compared(changes: Sequence[Changes]) -> PerStage:
    return _per_stage([[each[stage].value for stage in STAGES] for each in changes], published.CHANGE_OF_LLC)


def _outcomes(changes: Sequence[Changes], runs: Sequence[Shipped]) -> dict[str, dict[str, list[int]]]:
    """Stage -> what came of it -> the seeds."""
    found: dict[str, dict[str, list[int]]] = {stage: {} for stage in STAGES}
    for run, each in zip(runs, changes, strict=True):
        for stage in STAGES:
            found[stage].setdefault(each[stage].outcome(published.CHANGE_OF_LLC[stage]), []).append(run.seed)
    return found


def _implied() -> dict[str, float]:
    """What the paper's own changes of loss make of λ̂ if the chains' loss stays what it is: -nβ Δℓ."""
    return {stage: -published.NBETA * change for stage, change in published.CHANGE_OF_LOSS.items()}


def _summary(losses: PerStage, coefficients: PerStage, outcomes: dict[str, dict[str, list[int]]], num_runs: int) -> str:
    """The stages, and both changes in a line each."""
    rows = []
    for stage in STAGES:
        loss, coefficient, outcome = losses[stage], coefficients[stage], outcomes[stage]
        within = (
            "chains disagree"
            if "chains disagree" in outcome
            else f"{len(outcome.get('within', []))} of {num_runs} seeds"
        )
        rows.append([
            stage, f"{PUBLISHED_STAGE_ENDS[stage]:,}", PUBLISHED_STAGE_TYPES[stage],
            f"{loss.published:g}", f"{loss.mean:.3f} ± {loss.spread:.3f}",
            f"{coefficient.published:+g}", f"{coefficient.mean:+.1f} ± {coefficient.spread:.1f}", within,
        ])  # fmt: skip
    head = ["stage", "ends at step", "type", "Δℓ published", "Δℓ ours", "Δλ̂ published", "Δλ̂ ours", "Δλ̂ within the aim"]
    return markdown_table(head, rows)


def _losses_table(losses: PerStage, runs: Sequence[Shipped]) -> str:
    spans = [f"{start:,} to {end:,}" for start, end in runs[0].spans()]
    rows = [
        [stage, span, f"{loss.published:g}", *(f"{value:.3f}" for value in loss.values), *loss.cells(3)]
        for (stage, loss), span in zip(losses.items(), spans, strict=True)
    ]
    return markdown_table(["Δℓ", "checkpoints", "published", *titles(runs), *HEAD], rows)


def _low_noise_table(losses: PerStage, runs: Sequence[Shipped]) -> str:
    rows = [[stage, *(f"{value:.3f}" for value in loss.values)] for stage, loss in losses.items()]
    return markdown_table(["Δℓ, validation set", *titles(runs)], rows)


def _implied_table() -> str:
    rows = [
        [stage, f"{published.CHANGE_OF_LOSS[stage]:g}", f"{implied:+.1f}", f"{published.CHANGE_OF_LLC[stage]:+g}"]
        for stage, implied in _implied().items()
    ]
    return markdown_table(["stage", "Δℓ published", "−nβ Δℓ", "Δλ̂ published"], rows)


def _changes_table(changes: Sequence[Changes], runs: Sequence[Shipped]) -> str:
    rows = []
    for stage, comparison in _compared(changes).items():
        cells = [_marked(each[stage], published.CHANGE_OF_LLC[stage]) for each in changes]
        rows.append([stage, f"{comparison.published:+g}", *cells, *comparison.cells(1, "+")[: len(HEAD_OF_CHANGES)]])
    return markdown_table(["Δλ̂", "published", *titles(runs), *HEAD_OF_CHANGES], rows)


def _marked(change: Change, target: float) -> str:
    marks = {"outside": "**{}**", "undecided": "{} ?", "chains disagree": "{} †", "within": "{}"}
    return marks[change.outcome(target)].format(change)


def _types(runs: Sequence[Shipped]) -> dict[str, object]:
    """Which seeds have the published type for certain, and which another one, under each settings; and the table."""
    rows: list[list[str]] = []
    same: dict[str, dict[str, list[int]]] = {name: {} for name in ESTIMATES}
    other: dict[str, dict[str, list[int]]] = {name: {} for name in ESTIMATES}
    for name in ESTIMATES:
        each = [types(run, name) for run in runs]
        for stage, target in PUBLISHED_STAGE_TYPES.items():
            found = [kinds[stage] for kinds in each]
            certain = {run.seed: kind for run, (kind, share) in zip(runs, found, strict=True) if share >= CERTAIN}
            same[name][stage] = [seed for seed, kind in certain.items() if kind == target]
            other[name][stage] = [seed for seed, kind in certain.items() if kind != target]
            rows.append([f"`{name}`", stage, target, *(_type(*kind, target) for kind in found)])
    head = ["estimates", "stage", "published", *titles(runs)]
    return {"same_type": same, "other_type": other, "types_table": markdown_table(head, rows)}


def _type(kind: str, probability: float, target: str) -> str:
    if probability < CERTAIN:
        return f"undecided ({kind} {probability:.2f})"
    return kind if kind == target else f"**{kind}**"
