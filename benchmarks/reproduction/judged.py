"""The verdicts of the shipped estimates, by the rules of today.

    python -m benchmarks.reproduction.judged [--estimates llc.csv]

The chains of data/L2H4Minf ran before the tests of the target were there (`icl.sampling.stein`). What is left of them is their tables and a
part of their draws. The tests that need no more than the diagnostics of the tables are made anew. Whether chains were still rising was
judged from all draws, and stays as it was: the kept draws have the noise of batches that all chains share. All other tests are named as
not made.

With `--estimates`, rows of `llc_calibrated` get the verdicts of a table that `icl tabulate` made of the same estimates, run again where
the checkpoint is shipped, with all tests. λ̂ must be the same but for rounding: another processor sums in another order. The standard errors
of the table stay, by which all its seeds are compared.
"""

import argparse
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from icl.sampling.verdict import Evidence, Verdict, judge
from icl.storage.files import write_table

DATA = Path(__file__).parents[2] / "data" / "L2H4Minf"
TABLES = ("llc", "llc_long", "llc_calibrated")
KEYS = ["model_seed", "step"]
TESTED = "test/stiff"
"""A column that rows have whose target was tested."""
ROUNDING = 1e-4
RISING = "still rising: more burn-in"


def verdict_of(row: Mapping[Hashable, Any]) -> str:
    """The verdict on one row of a table, from its diagnostics and what its last verdict said of a rise."""
    assert not row["chains/lost"]  # their number is told beside that of the others, which is not here
    verdict = judge(
        torch.full((2, 3), row["llc/mean"]).double(),  # the mean is all that is looked at
        num_lost=0,
        rhat=row["llc/rhat"],
        ess=row["llc/ess"],
        mcse=row["llc/mcse"],
        mean_loss=row["loss/mean"],
        init_loss=row["loss/init"],
        reference_loss=row["loss/zero"],
        noise_heating=row["noise/heating"],
        evidence=Evidence(),
    )
    return "; ".join(filter(None, (RISING if RISING in row["verdict"] else "", _shortened(verdict))))


def _shortened(verdict: Verdict) -> str:
    """What failed, and the names of what was not tested: its remedies would be those of a run that can go on."""
    failed = [finding.text for finding in verdict.findings if finding.outcome == "failed"]
    untested = [finding.name for finding in verdict.findings if finding.outcome == "not tested"]
    return "; ".join([*failed, f"not tested: {', '.join(untested)}"] if untested else failed) or verdict.text


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its verdicts made anew, but for rows whose target was tested."""
    rows = table.to_dict("records")
    return table.assign(
        verdict=[verdict_of(row) if pd.isna(row.get(TESTED, np.nan)) else row["verdict"] for row in rows]
    )


def with_estimates(table: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """The table with verdicts and tests of estimates that were made again.

    Raises:
        ValueError: a λ̂ is not what it was.
    """
    table, again = table.set_index(KEYS), again.set_index(KEYS)
    numbers = ["llc/mean", "loss/init", "loss/mean", "distance"]
    known = table.loc[again.index, numbers]
    if not np.allclose(again[numbers], known, rtol=ROUNDING, atol=0):
        worst = dict((again[numbers] / known - 1).abs().max())
        raise ValueError(f"these estimates are not those of the table: largest relative differences {worst}")
    fresh = [name for name in again if name.startswith("test/") or name in ("gamma/sensitivity", "verdict")]
    for name in fresh:
        if name not in table:
            table[name] = np.nan
        table.loc[again.index, name] = again[name]
    return table.reset_index()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--estimates", type=Path, help="a table of calibrated estimates that were made again")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args(arguments)
    for name in TABLES:
        table = pd.read_csv(options.data / f"{name}.csv")
        if options.estimates is not None and name == "llc_calibrated":
            table = with_estimates(table, pd.read_csv(options.estimates))
        done = judged(table)
        print(name, done["verdict"].str.split("[:;]").str[0].value_counts().to_dict())
        write_table(done, options.data / f"{name}.csv", digits=7)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
