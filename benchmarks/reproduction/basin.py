"""Where the chains of the estimates were: tables and sentences for docs/reproduction.md."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from benchmarks.pages import markdown_table
from benchmarks.reproduction.shipped import Shipped
from icl.analysis.climb import estimates_within


def basin(shipped: Shipped) -> dict[str, object]:
    """The numbers of the section on the basin."""
    llc, sampler = shipped.needed("llc"), shipped.sampler("llc")
    young, level = _young(shipped)
    whole, half = shipped.crossings(1.0), shipped.crossings(0.5)
    late, ends = shipped.second_half.set_index("step")["loss/mean"], shipped.boundaries()
    medians = half.groupby("step")["crossing"].median()
    norms = shipped.needed("evals").set_index("step")["weight/norm"]
    return {
        "zero": f"{llc['loss/zero'].iloc[0]:g}",
        "num_useful": whole["step"].nunique(),
        "num_chains": len(whole),
        "num_crossed": int(whole["crossing"].notna().sum()),
        "num_draws": f"{shipped.needed('llc_traces')['draw'].max():,}",
        "stretch": f"{shipped.needed('llc_traces')['draw'].min():,}",
        "half_way": f"{medians.min():,.0f} to {medians.max():,.0f}",
        "first_crossing": _median_crossing(whole, ends["LR2"]),
        "middle_crossing": _median_crossing(whole, ends["LR3"]),
        "last_crossing": _median_crossing(whole, ends["LR4"]),
        "final_crossing": _median_crossing(whole, ends["LR5"]),
        "first_level": f"{late[ends['LR2']]:.3f}",
        "middle_level": f"{late[ends['LR3']]:.3f}",
        "num_young": len(young),
        "level": f"{level:.3f}",
        "level_spread": f"{np.ptp(young['loss/mean']):.4f}",
        "loss_fall": f"{np.ptp(young['loss/init']):.2f}",
        "deviation": f"{_deviation(shipped):.1f}",
        "nbeta": f"{sampler.inverse_temperature:.1f}",
        "distances": f"{llc['distance'].min():.2f} to {llc['distance'].max():.2f}",
        "free_distance": f"{_free_distance(shipped, 'llc'):.2f}",
        "norms": ", ".join(f"{norms[ends[stage]]:.0f}" for stage in ("LR2", "LR3", "LR4", "LR5")),
    }


def _median_crossing(crossings: pd.DataFrame, step: int) -> str:
    """Over the chains of one checkpoint; those that never cross count as later than any."""
    median = crossings.loc[crossings["step"] == step, "crossing"].fillna(math.inf).median()
    return f"{median:,.0f}" if math.isfinite(median) else "more than there are"


def _young(shipped: Shipped) -> tuple[pd.DataFrame, float]:
    """Estimates up to the end of LR2, and the mean loss of their chains."""
    llc = shipped.needed("llc")
    young = llc[llc["step"] <= shipped.boundaries()["LR2"]]
    return young, float(young["loss/mean"].mean())


def _deviation(shipped: Shipped) -> float:
    """How far λ̂ is from the loss turned over, at most, up to the end of LR2."""
    young, level = _young(shipped)
    predicted = shipped.sampler("llc").inverse_temperature * (level - young["loss/init"])
    return float((young["llc/mean"] - predicted).abs().max())


def _free_distance(shipped: Shipped, table: str) -> float:
    """√(P/γ): how far the localisation alone lets chains diffuse."""
    return math.sqrt(shipped.num_parameters / shipped.sampler(table).localization)


def chains(shipped: Shipped) -> str:
    """One row per estimate: where its chains were."""
    tables = [shipped.second_half, shipped.table("llc_calibrated")]
    ways = [shipped.crossings(0.5), shipped.crossings(1.0)]
    norms = shipped.needed("evals").set_index("step")["weight/norm"]
    rows = []
    for _, row in shipped.needed("llc").iterrows():
        cells = [f"{norms[row['step']]:.0f}", f"{row['loss/init']:.3f}", f"{row['loss/mean']:.3f}"]
        cells += [_crossings(way.loc[way["step"] == row["step"], "crossing"]) for way in ways]
        cells.append(_estimate(row))
        for table in tables:
            same = pd.DataFrame() if table is None else table[table["step"] == row["step"]]
            cells.append("not sampled" if same.empty else _estimate(same.iloc[0]))
        rows.append([f"{row['step']:,}", *cells])
    head = [
        "step",
        "‖w‖",
        "L(w)",
        "E[L]",
        "half way",
        "worse than 0",
        "λ̂, published settings",
        "λ̂, second half",
        "λ̂, calibrated",
    ]
    return markdown_table(head, rows)


def long_chains(shipped: Shipped, count: int = 4) -> str:
    """λ̂ of much longer chains, from one part of their draws after another, and what then changes over the stages."""
    estimates, traces = shipped.needed("llc_long"), shipped.needed("llc_long_traces")
    parts = [estimates_within(traces, estimates, k / count, (k + 1) / count) for k in range(count)]
    steps, means = parts[0]["step"], np.array([part["llc/mean"] for part in parts])
    rows = [[f"{step:,}", *(_estimate(part.iloc[i]) for part in parts)] for i, step in enumerate(steps)]
    for (start, end), changes in zip(pairwise(steps), np.diff(means, axis=1).T, strict=True):
        rows.append([f"{start:,} to {end:,}", *(f"{change:+.1f}" for change in changes)])
    size = traces["draw"].max() // count
    head = ["step", *(f"draws {k * size + 1:,} to {(k + 1) * size:,}" for k in range(count))]
    return markdown_table(head, rows)


def _crossings(draws: pd.Series) -> str:
    """First to last, and how many never."""
    if draws.empty:
        return "w is no better"
    never = int(draws.isna().sum())
    known = f"{draws.min():,.0f} to {draws.max():,.0f}" if never < len(draws) else ""
    return known + (f", {never} of {len(draws)} never" if never else "")


def calibrated(shipped: Shipped) -> str:
    """What the calibrated settings are, and how their chains fare."""
    table = shipped.table("llc_calibrated")
    if table is None:
        return "A curve under calibrated settings is not shipped; `icl calibrate` and docs/llc.md say how to make one."
    settings = shipped.sampler("llc_calibrated")
    verdicts = table["verdict"].str.split(":").str[0].value_counts()
    useful = table[table["loss/init"] < table["loss/zero"]]
    above = int((useful["loss/mean"] > useful["loss/zero"]).sum())
    peak = table.loc[table["llc/mean"].idxmax()]
    return (
        f"The calibrated settings are ε = {_number(settings.step_size)}, γ = {_number(settings.localization)}, "
        f"nβ = {settings.inverse_temperature:.3g}; {table['chains'].max()} chains × {settings.num_draws} draws after "
        f"{settings.num_burnin_steps} steps of burn-in. Their chains too lie\nwhere the localisation alone would have them, "
        f"{table['distance'].min():.2f} to {table['distance'].max():.2f} away from w_t (√(P/γ) = "
        f"{_free_distance(shipped, 'llc_calibrated'):.2f}): most directions are flat under either setting. What differs is the loss there: "
        f"of {len(useful)} checkpoints that\nare better than predicting 0 the mean loss of their chains is worse at {above}. "
        f"Verdicts of the {len(table)} estimates: {', '.join(f'{name} ({count})' for name, count in verdicts.items())}.\n"
        f"λ̂ is largest at step {peak['step']:,}, {_estimate(peak)}. "
        "[llc-settings](../figures/L2H4Minf-seed-1/llc-settings.png) shows both curves. They estimate\ndifferent "
        "things: the calibrated one the loss in a small ball about w_t, the published one in a ball that hardly meets the basin."
    )


def scale_of_weights(runs: Sequence[Shipped]) -> str:
    """How the size of the weights and the curvature of the loss change over LR3, seed by seed."""
    rows = []
    for run in runs:
        start, end = (run.boundaries()[stage] for stage in ("LR2", "LR3"))
        norms = run.needed("evals").set_index("step")["weight/norm"].loc[[start, end]].to_numpy()
        traces = run.needed("hessian").set_index("step")["hessian/trace"].loc[[start, end]].to_numpy()
        change = traces[1] * norms[1] ** 2 / (traces[0] * norms[0] ** 2) - 1
        spans = f"{norms[0]:.0f} to {norms[1]:.0f}", f"{traces[0]:,.0f} to {traces[1]:,.0f}"
        rows.append([f"seed {run.seed}", *spans, f"{100 * change:+.0f} %"])
    return markdown_table(["over LR3", "‖w‖", "tr H", "tr H ‖w‖² changes by"], rows)


def each_seed(runs: Sequence[Shipped]) -> str:
    """What the estimates of each seed say of its chains."""
    rows = []
    for run in runs:
        crossed, late, table = run.crossings(1.0), run.boundaries()["LR4"], run.table("llc_calibrated")
        at_end = crossed.loc[crossed["step"] == late, "crossing"]
        in_time = (at_end <= run.needed("llc_traces")["draw"].max() / 2).sum()
        cells = [f"{crossed['crossing'].notna().sum()} of {len(crossed)}", f"{crossed['step'].nunique()}"]
        cells += [f"{in_time} of {len(at_end)}", f"{_deviation(run):.1f}"]
        peak = None if table is None else table.loc[table["llc/mean"].idxmax()]
        cells += ["not sampled"] if peak is None else [f"{_estimate(peak)} at {peak['step']:,}"]
        rows.append([f"seed {run.seed}", *cells])
    head = [
        "", "chains that come to do worse than 0", "at checkpoints", f"those of step {runs[0].boundaries()['LR4']:,} by half the draws",
        "λ̂ is the loss turned over to within", "largest calibrated λ̂",
    ]  # fmt: skip
    return markdown_table(head, rows)


def agreement(runs: Sequence[Shipped]) -> Iterator[str]:
    """How far the estimates of the seeds lie apart at the checkpoints that all of them have."""
    for name, title in (("llc", "published"), ("llc_calibrated", "calibrated")):
        tables = [table.set_index("step")["llc/mean"] for run in runs if (table := run.table(name)) is not None]
        if len(tables) > 1:
            both = pd.concat(tables, axis=1, join="inner")
            apart = both.max(axis=1) - both.min(axis=1)
            yield (
                f"- Between seeds, at {len(both)} common checkpoints, λ̂ under the {title} settings differs by "
                f"{apart.median():.1f} in the median and by {apart.max():.1f} at most (step {apart.idxmax():,}), over a range "
                f"of {np.ptp(both.to_numpy()):.0f}."
            )


def _estimate(row: pd.Series) -> str:
    return f"{row['llc/mean']:.1f} ± {row['llc/mcse']:.1f}"


def _number(value: float | None) -> str:
    return "found by each run" if value is None else f"{value:g}"
