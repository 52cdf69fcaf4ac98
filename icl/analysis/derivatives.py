"""Finite-difference derivatives of training curves in t, in log t, and of logarithms in log t.

Times are training steps; log t stands for log(step + 1), because a curve starts at step 0.
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def d_dt(steps: ArrayLike, values: ArrayLike) -> Array:
    """The mean of the slopes on either side, dv/ds at every point.

    derivative_i = ½ [(v_{i+1} - v_i) / (s_{i+1} - s_i) + (v_i - v_{i-1}) / (s_i - s_{i-1})]; the first and the last
    point take their neighbour's. This is the definition behind the curves of arXiv 2402.02364. It is exact for a line
    on any grid, and for a parabola on an even one.

    Args:
        steps: (N,), strictly increasing, N >= 2; any unit.
        values: (..., N).

    Returns:
        (..., N), in units of value per unit of `steps`.

    Raises:
        ValueError: lengths differ, fewer than two points, or steps that do not increase.
    """
    times, curve = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if times.ndim != 1 or curve.shape[-1:] != times.shape:
        raise ValueError(f"steps (N,) and values (..., N) must agree, got {times.shape} and {curve.shape}")
    if times.size < 2:
        raise ValueError("a derivative needs at least two points")
    if not (np.diff(times) > 0).all():
        raise ValueError("steps must be strictly increasing; sort the table and drop repeated steps")
    slopes = np.diff(curve, axis=-1) / np.diff(times)
    inner = (slopes[..., 1:] + slopes[..., :-1]) / 2
    if times.size == 2:
        return np.concatenate((slopes, slopes), axis=-1)
    return np.concatenate((inner[..., :1], inner, inner[..., -1:]), axis=-1)


def d_dlogt(steps: ArrayLike, values: ArrayLike) -> Array:
    """dv / dlog(step + 1): the change per e-fold of training time; see `d_dt` for shapes and errors."""
    return d_dt(np.log1p(np.asarray(steps, dtype=float)), values)


def dlog_dlogt(steps: ArrayLike, values: ArrayLike) -> Array:
    """dlog v / dlog(step + 1): the local exponent of a power law.

    Raises:
        ValueError: a value is not positive, besides the errors of `d_dt`.
    """
    curve = np.asarray(values, dtype=float)
    if not (curve > 0).all():
        raise ValueError("dlog_dlogt needs positive values; use d_dlogt")
    return d_dlogt(steps, np.log(curve))


def add_derivatives(table: pd.DataFrame, columns: list[str], by: str = "model_seed") -> pd.DataFrame:
    """The table, sorted, with `<column>/d_dt`, `/d_dlogt` and, where the column is positive, `/dlog_dlogt`, for each
    run by itself.

    Args:
        table: one row per (run, step), with columns `step` and `by`.
        columns: the curves to differentiate.
        by: the column that tells runs apart.
    """
    runs = []
    for _, run in table.sort_values([by, "step"]).groupby(by, sort=False):
        steps = run["step"].to_numpy()
        new = {}
        for column in columns:
            values = run[column].to_numpy(dtype=float)
            new[f"{column}/d_dt"] = d_dt(steps, values)
            new[f"{column}/d_dlogt"] = d_dlogt(steps, values)
            if (values > 0).all():
                new[f"{column}/dlog_dlogt"] = dlog_dlogt(steps, values)
        runs.append(run.assign(**new))
    return pd.concat(runs, ignore_index=True)
