"""The tables of docs/llc.md, from data/llc_accuracy: `python -m benchmarks.llc.page`."""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.pages import fill, mark, markdown_table, rows_of
from icl.execution.closing import in_short
from icl.storage.files import write_atomically

ROOT = Path(__file__).parents[2]
PAGE, DATA = ROOT / "docs/llc.md", ROOT / "data/llc_accuracy"
COMMAND = "python -m benchmarks.llc.page"
FAMILIES = ("RRR and DLN together", "reduced-rank regression", "deep linear network", "regular", "normal crossing")
METHODS = ("icl", "devinterp sgld", "devinterp rmsprop_sgld")
HARDEST = "17-12-24-20-28-25-22 rank 3"


def page(text: str) -> str:
    """The page with its tables as the data have them now."""
    for name, table in {
        "accuracy": accuracy(), "bias": bias(), "standard errors": standard_errors(), "calibration": calibration(),
        "honesty": honesty(), "honesty by kind": honesty("kind"), "honesty by family": honesty("family"),
        "honesty of fresh seeds": honesty("kind", "honesty_fresh_summary"), "loaders": loaders(),
        "standard errors of kernels": kernels(), "examples": examples(), "size": size(),
    }.items():  # fmt: skip
        text = fill(text, mark(COMMAND, name), table)
    return text


def accuracy() -> str:
    """Errors per family and sampler."""
    summary = pd.read_csv(DATA / "summary.csv").set_index(["family", "method"])
    rows = []
    for key in ((family, method) for family in FAMILIES for method in METHODS):
        row = summary.loc[key]
        rows.append([
            *key, f"{row['models']:.0f}", percent(row["median"]), percent(row["p90"]), percent(row["bias"], "+"),
            "" if pd.isna(row["kendall"]) else f"{row['kendall']:.3g}", "" if key[1] == "icl" else percent(row["icl_no_worse"], digits=0),
        ])  # fmt: skip
    head = (
        "family",
        "sampler",
        "number of models",
        "median error",
        "90th percentile",
        "bias",
        "Kendall τ",
        "icl no worse",
    )
    return markdown_table(head, rows)


def bias() -> str:
    """The hardest network by its localisation."""
    table = pd.read_csv(DATA / "bias.csv")
    rows = [
        [
            f"{row.times:g}",
            f"{row.gamma:.3g}",
            f"{row.estimate:.1f} ± {row.mcse:.1f}",
            percent(row.relative_error, "+"),
        ]
        for row in rows_of(table.loc[table["model"] == HARDEST])
    ]
    return markdown_table(("times the default", "γ", "λ̂", "error"), rows)


def size() -> str:
    """Cost and memory against the number of parameters."""
    rows = [
        [
            f"{row.parameters:,.0f}", f"{row.icl:.3g}", f"{row.devinterp:.3g}", f"{row.ratio:.2f}", f"{row.noise:.2g}", f"{row.randn:.2g}",
            "" if pd.isna(row.vectors_per_chain) else f"{row.vectors_per_chain:.1f}",
        ]
        for row in rows_of(pd.read_csv(DATA / "size.csv"))
    ]  # fmt: skip
    head = ("parameters", "icl, ms", "devinterp, ms", "ratio", "noise, ms", "torch.randn, ms", "vectors per chain")
    return markdown_table(head, rows)


def standard_errors() -> str:
    """How often a number lies within two reported errors."""
    rows = [
        [
            row.model, f"{row.coefficient:g}", f"{row.long_run_mean:.2f}", f"{row.spread:.3f}", f"{row.reported_error:.3f}",
            percent(row.mean_within_2, digits=0), percent(row.truth_within_2, digits=0),
        ]
        for row in rows_of(pd.read_csv(DATA / "standard_errors.csv"))
    ]  # fmt: skip
    head = (
        "model", "λ", "long-run mean", "spread of λ̂", "reported error", "within 2 errors of the mean", "within 2 errors of the truth",
    )  # fmt: skip
    return markdown_table(head, rows)


def kernels() -> str:
    """How often the long-run mean lies within two reported errors, for every kernel."""
    rows = [
        [
            row.model, row.kernel, f"{row.repetitions}", f"{row.spread:.3f}", f"{row.reported_error:.3f}",
            percent(row.mean_within_2, digits=0),
        ]
        for row in rows_of(pd.read_csv(DATA / "standard_errors_kernels.csv"))
    ]  # fmt: skip
    return markdown_table(
        ("model", "kernel", "repetitions", "spread of λ̂", "reported error", "within 2 errors of the mean"), rows
    )


def honesty(of: str = "all", name: str = "honesty_summary") -> str:
    """What verdicts are worth: over all cases, by kind of setting, or by family of models."""
    table = pd.read_csv(DATA / f"{name}.csv")
    rows = [
        [
            row.group, f"{row.cases:.0f}", percent(row.wrong, digits=0), percent(row.wrong_and_healthy),
            f"{row.sound:.0f}", percent(row.sound_healthy_within_10_percent, digits=0) if row.sound else "",
            percent(row.false_alarms) if row.sound else "", percent(row.undecided) if row.sound else "",
        ]
        for row in rows_of(table.loc[table["of"] == of])
    ]  # fmt: skip
    head = (
        of if of != "all" else "", "cases", "wrong", "wrong and healthy", "sound", "of these healthy and within 10 %",
        "false alarms", "undecided",
    )  # fmt: skip
    return markdown_table(head, rows)


def loaders() -> str:
    """The default settings on loaders."""
    rows = [
        [
            row.model, f"{row.batch:,}", f"{row.estimate:.3g} ± {row.mcse:.2g}",
            f"{row.reference:.3g}" + (f" ± {row.reference_error:.2g}" if row.reference_error else ""),
            f"{row.gamma:.3g}", f"{row.steps:,}", str(row.verdict),
        ]
        for row in rows_of(pd.read_csv(DATA / "loaders.csv", keep_default_na=False))
    ]  # fmt: skip
    return markdown_table(("model", "batch", "λ̂", "reference", "γ", "steps", "verdict"), rows)


def examples() -> str:
    """The files of examples/ by icl and by devinterp."""
    rows = [
        [
            row.example, f"{row.step:,}", f"{row.lines_icl}", f"{row.lines_devinterp}", f"{row.gradients_icl:,}",
            f"{row.icl:.3g} ± {row.icl_error:.2g}", f"{row.devinterp:.3g}, spread {row.devinterp_spread:.2g}",
            "" if pd.isna(row.known) else f"{row.known:.3g}", f"{row.icl_seconds:.0f}, {row.devinterp_seconds:.0f}", in_short(row.verdict),
        ]
        for row in rows_of(pd.read_csv(DATA / "examples.csv"))
    ]  # fmt: skip
    head = (
        "example", "step", "lines with icl", "with devinterp", "gradients", "icl's λ̂", "devinterp's", "known", "processor seconds",
        "icl's verdict",
    )  # fmt: skip
    return markdown_table(head, rows)


def calibration() -> str:
    """The search on the paper's model: one row per cell, its estimate and verdict at every checkpoint."""
    cells = pd.read_csv(DATA / "calibration.csv", keep_default_na=False)
    steps = sorted(cells["step"].unique())
    rows = []
    for _, group in cells.groupby(["setting", "epsilon", "gamma", "nbeta"], sort=False):
        setting, epsilon, gamma, nbeta = group.iloc[0][["setting", "epsilon", "gamma", "nbeta"]]
        at = group.set_index("step")
        row = [setting or "grid", f"{epsilon:.2g}", f"{gamma:.4g}", f"{nbeta:.3g}"]
        rows.append(
            row + [f"{at.loc[s, 'llc']:.1f} ± {at.loc[s, 'mcse']:.1f}, {short(at.loc[s, 'verdict'])}" for s in steps]
        )
    return markdown_table(("setting", "ε", "γ", "nβ", *(f"step {step:,}" for step in steps)), rows)


def percent(share: float, sign: str = "", digits: int = 1) -> str:
    return f"{100 * share:{sign}.{digits}f} %"


def short(verdict: object) -> str:
    """A verdict without its numbers."""
    return str(verdict).split(":")[0]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # so that --help explains, and writes nothing
    write_atomically(PAGE, page(PAGE.read_text()).encode())
    print(PAGE.relative_to(ROOT))
