"""Results as tables for people: benchmarks/results/README.md, and the short table of the project's README."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.pages import fill, mark, markdown_table, rows_of
from icl.storage.files import write_atomically

SHOWN = ("what", "variant", "time", "times as fast", "note")

MARK = mark("python -m benchmarks.speed --table")
HEADLINES = {
    ("training step, B = 256", "native, E = 1, one process"): "training step, one process",
    ("training step, B = 256", "native, E = 10, a worker per core"): "training step per seed, one worker per core",
    ("training step, B = 256", "no compiler, E = 1, one process"): "training step without a compiler, one process",
    (
        "training step, B = 256",
        "no compiler, E = 10, a worker per core",
    ): "training step without a compiler, one worker per core",
    ("SGLD step, B = 1024", "native, C = 1"): "SGLD step, one chain",
    ("SGLD step, B = 1024", "native, C = 4"): "SGLD step per chain, four chains",
    ("SGLD step, B = 1024", "native, C = 10"): "SGLD step per chain, ten chains",
    ("dMMSE, M = 4096, B = 1024", "native"): "dMMSE, 4096 tasks",
    ("dMMSE, M = 1048576, B = 1024", "native"): "dMMSE, 2^20 tasks",
}

RESULTS_HEAD = """# Speed: all measurements

For readers who want every number behind docs/speed.md. `python -m benchmarks.speed` makes this page from the CSV files here; do not edit
it.

The textbook is a plain PyTorch loop of the same model. In each group of rows the first row is the baseline. All rows of a group are timed
by turns in one run. A time is the median over rounds. 'Times as fast' is the median of the rounds' ratios, with quartiles in brackets. E
is the number of seeds trained together, C the number of chains, B the batch size, M the number of tasks. `benchmarks/speed/cases.py` says
what each row does.
"""


def duration(seconds: float) -> str:
    """With three digits, in the unit that suits."""
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if seconds < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds / 60:.3g} min"


def readable(results: pd.DataFrame) -> pd.DataFrame:
    """The columns `SHOWN`, as text."""
    rows = [
        {
            "what": f"{row.section}, per {row.unit}" if row.unit != "peak" else row.section,
            "variant": row.variant,
            "time": duration(row.seconds) if row.unit != "peak" else "",
            "times as fast": f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})" if row.speedup == row.speedup else "",
            "note": row.note,
        }
        for row in rows_of(results)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(SHOWN))


def markdown(results: pd.DataFrame, columns: Sequence[str]) -> str:
    """A Markdown table of results."""
    return markdown_table(columns, readable(results)[list(columns)].values.tolist()) + "\n"


def results_page(folder: Path) -> str:
    """The text of benchmarks/results/README.md: every result file under `folder`, in full."""
    parts = [RESULTS_HEAD]
    for path in sorted(folder.glob("speed-*.csv")):
        results = read(path)
        parts.append(f"## {results['device'].iloc[0]}\n\n{markdown(results, SHOWN)}")
    return "\n".join(parts)


def headlines(path: Path) -> str:
    """The short table of the project's README, from one result file."""
    results = read(path).set_index(["section", "variant"])
    rows = []
    for (section, variant), title in HEADLINES.items():
        row, textbook = results.loc[(section, variant)], results.loc[(section, "textbook")]
        spread = f"{row['speedup']:.1f} ({row['speedup_low']:.1f} to {row['speedup_high']:.1f})"
        rows.append([title, spread, duration(row["seconds"]), duration(textbook["seconds"])])
    device = results["device"].iloc[0]
    caption = f"{device}. Medians over rounds, quartiles in brackets. All results are in `benchmarks/results/`."
    head = ("against a textbook PyTorch loop in the same run", "times as fast", "time", "textbook")
    return f"{markdown_table(head, rows)}\n\n{caption}"


def read(path: Path) -> pd.DataFrame:
    """One result file."""
    return pd.read_csv(path, keep_default_na=False, na_values=["nan"])


def write_pages(folder: Path) -> None:
    """Make the results' page anew, and the table in the project's README."""
    write_atomically(folder / "README.md", results_page(folder).encode())
    readme = folder.parents[1] / "README.md"
    write_atomically(readme, fill(readme.read_text(), MARK, headlines(main_results(folder))).encode())


def main_results(folder: Path) -> Path:
    """The file that the project's README shows: the first."""
    return min(folder.glob("speed-*.csv"))
