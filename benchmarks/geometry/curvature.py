"""How many directions of the Hessian lie above γ: `python -m benchmarks.geometry.curvature`.

The Hessian is that of the loss on 1024 sequences, at the stage ends of model seed 1. In relative units it is S H S, with S the diagonal
matrix of the units of `icl.sampling.units`. One row per step, units and γ goes to data/L2H4Minf/curvature.csv. A step whose rows exist is
left out.
"""

import argparse
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.geometry.settings import FAMILY, SETTINGS, STAGE_ENDS, Run
from icl.analysis.curvature import CurvatureSpectrum, curvature_spectrum
from icl.analysis.hessian import NUM_SEQUENCES, hessian_vector_product, regression_loss
from icl.sampling.transformer_objective import weight_groups
from icl.sampling.units import units_of
from icl.storage.files import write_table

TABLE = FAMILY / "curvature.csv"
EIGENVALUES, PROBES, NODES = 16, 4, 32
CLEAR = 2.0
DECADES = np.linspace(-2, 2, 25)
"""log10 of γ, relative to the γ of the calibrated setting."""


def spectrum_at(run: Run, step: int, units: str) -> CurvatureSpectrum:
    """The spectrum of the Hessian at a checkpoint."""
    model = run.model(step)
    loss, point = regression_loss(model, *run.sequences(0, NUM_SEQUENCES))
    product = hessian_vector_product(loss, point)
    scale = units_of(point, weight_groups(model.shape)) if units == "relative" else point.new_ones(len(point))
    return curvature_spectrum(lambda vector: scale * product(scale * vector), point, EIGENVALUES, PROBES, NODES)


def rows_of(found: CurvatureSpectrum, units: str) -> list[dict[str, float | str]]:
    """The soft count at each γ at least CLEAR times as large as the most negative curvature. Nearer to it one direction decides all."""
    gammas, nbeta = SETTINGS[units].localization * 10.0**DECADES, SETTINGS[units].inverse_temperature
    rows = []
    for gamma in gammas[gammas > -CLEAR * nbeta * found.lowest]:
        total, error = found.total(partial(share_above, nbeta, gamma))
        rows.append({
            "units": units, "gamma": float(f"{gamma:.6g}"), "count": total, "count/std_error": error, "lowest": found.lowest,
            "largest": float(found.eigenvalues.max()),
        })  # fmt: skip
    return rows


def share_above(nbeta: float, gamma: float, curvatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """d / (d + γ) with d = nβ h: how far each direction counts."""
    return nbeta * curvatures / (nbeta * curvatures + gamma)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="*", default=list(STAGE_ENDS.values()))
    parser.add_argument("--units", choices=list(SETTINGS), nargs="*", default=list(SETTINGS))
    chosen = parser.parse_args()
    run = Run(1)
    for step in chosen.steps:
        for units in chosen.units:
            table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["model_seed", "step", "units"])
            if len(table[(table["step"] == step) & (table["units"] == units)]):
                continue
            new = pd.DataFrame(rows_of(spectrum_at(run, step, units), units))
            new.insert(0, "step", step)
            new.insert(0, "model_seed", run.seed)
            table = pd.concat([table, new], ignore_index=True) if len(table) else new
            write_table(table.sort_values(["model_seed", "step", "units", "gamma"]), TABLE)
            print(step, units, flush=True)


if __name__ == "__main__":
    main()
