"""Where the estimator's bias comes from: the localisation in deep linear networks, a finite nβ at normal crossings.

    python -m benchmarks.llc.bias [--output data/llc_accuracy]

**Deep linear networks.** Networks on which the default is far below the truth are sampled at the default's γ
and at 2, 4 and 16 times it. The error shrinks as γ falls.

**Normal crossings.** nβ E[L] of w1 w2 at finite nβ and γ is known by quadrature. It approaches λ = 1/2 like 1/log nβ, because the
coefficient has multiplicity 2. No sampler can do better than that number.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks.llc import NUM_SAMPLES
from benchmarks.llc.accuracy import zoo
from icl.sampling import AUTOMATIC
from icl.sampling.llc import Inputs, estimate_llc_of
from icl.sampling.truth import KnownModel, normal_crossing_at
from icl.storage.files import write_table

WORST = ("17-12-24-20-28-25-22 rank 3", "28-5-21-21-22-18-12 rank 0")
DRAWS = 6000
TIMES = (1.0, 2.0, 4.0, 16.0)
"""Multiples of the default's γ, itself first."""


def by_localisation(model: KnownModel, times: Sequence[float]) -> list[dict[str, float | str | int]]:
    """One row per multiple of the default's γ."""
    rows, default = [], None
    for factor in times:
        given = {} if default is None else {"gamma": factor * default}
        config = AUTOMATIC.model_copy(update={"eval_dataset_size": NUM_SAMPLES, "num_draws": DRAWS, **given})
        result = estimate_llc_of(model.objective(), Inputs([model.batch]), config)
        default = default or result.config.localization
        rows.append({
            "model": model.name, "coefficient": model.coefficient, "times": factor, "gamma": result.config.localization,
            "nbeta": result.nbeta, "estimate": result.llc_mean, "mcse": result.llc_mcse,
            "relative_error": result.llc_mean / model.coefficient - 1, "verdict": result.verdict.text,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def by_temperature(nbetas: Sequence[float]) -> list[dict[str, float | str | int]]:
    """One row per nβ: the exact value for w1 w2 at γ = 1."""
    return [
        {
            "model": "w1^1×w2^1, exact", "coefficient": 0.5, "gamma": 1.0, "nbeta": nbeta, "mcse": 0.0,
            "estimate": normal_crossing_at((1, 1), 1, nbeta, 1.0),
            "relative_error": normal_crossing_at((1, 1), 1, nbeta, 1.0) / 0.5 - 1,
        }
        for nbeta in nbetas
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("data/llc_accuracy"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = by_temperature((1e3, 1e4, 1e6, 1e9, 1e12))
    for model in (model for model in zoo() if model.name in WORST):
        rows += by_localisation(model, TIMES)
    table = pd.DataFrame(rows)
    write_table(table, options.output / "bias.csv", digits=5)
    print(table.to_string(index=False, float_format="%.4g"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
