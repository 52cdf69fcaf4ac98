"""Forms of a run's trajectory: the points around which it turns (arXiv 2402.02364; `icl.analysis.geometry`).

They are found in the run's table `essential_dynamics`. A trajectory has the columns `step`, `pc/0`, `pc/1`, ...
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from icl.analysis.essential_dynamics import NUM_EQUAL_STEPS
from icl.analysis.geometry import detect_forms, geometry_table
from icl.analysis.smoothing import local_scatter, sigma_ramp, variable_gaussian_filter

FEWEST_CHECKPOINTS = 500
"""The fewest checkpoints for finding forms. The paper used 5000."""

# As published for NUM_EQUAL_STEPS checkpoints: the first width, the last width, and the index from which the last one holds.
_SMOOTHING = np.array([1.0, 60.0, 200.0])


def functional_trajectory(table: pd.DataFrame) -> pd.DataFrame:
    """The trajectory that the paper shows: that of all outputs at all tokens."""
    return pd.DataFrame(table.loc[table["variant"] == "tokens"])


def smoothed(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The trajectory, smoothed with a width that grows along it. The widths are the published ones, scaled to its number of points."""
    names = [name for name in trajectory.columns if str(name).startswith("pc/")]
    early, late, end = _SMOOTHING * len(trajectory) / NUM_EQUAL_STEPS
    sigmas = sigma_ramp(len(trajectory), max(1.0, early), max(2.0, late), max(1, round(end)))
    values = trajectory[names].to_numpy(dtype=float)
    columns = [variable_gaussian_filter(values[:, i], sigmas) for i in range(values.shape[1])]
    return trajectory.assign(**dict(zip(names, columns, strict=True)))


def forms_of(trajectory: pd.DataFrame, num_components: int = 3) -> pd.DataFrame | None:
    """The forms of a trajectory. None if it has too few points, because smoothing then makes cusps of its own."""
    if len(trajectory) < FEWEST_CHECKPOINTS:
        return None
    raw = _in_order(trajectory)
    scores = _scores(smoothed(raw), num_components)
    scatter = local_scatter(_scores(raw, num_components), scores, round(_SMOOTHING[1] * len(raw) / NUM_EQUAL_STEPS))
    return detect_forms(scores, raw["step"].to_numpy(), num_components, scatter=scatter)


def circles_of(trajectory: pd.DataFrame, num_components: int = 3) -> pd.DataFrame:
    """The osculating circles of the smoothed trajectory: `icl.analysis.geometry.geometry_table`."""
    smooth = smoothed(_in_order(trajectory))
    return geometry_table(_scores(smooth, num_components), smooth["step"].to_numpy(), num_components)


def _in_order(trajectory: pd.DataFrame) -> pd.DataFrame:
    return trajectory.sort_values("step", kind="stable")


def _scores(trajectory: pd.DataFrame, num_components: int) -> NDArray[np.float64]:
    names = [f"pc/{i}" for i in range(num_components) if f"pc/{i}" in trajectory.columns]
    return trajectory[names].to_numpy(dtype=float)
