"""Losses of samples at the draws, as series. They are read in pieces. Means over them have standard errors, and their mixing is checked.

Shapes: E chains, N draws, S series (samples, or samples × tokens), U independent parts of the draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from icl.sampling.diagnostics import bulk_ess, independent_parts, split_rhat, student_factor
from icl.sampling.verdict import ESS_LIMIT, RHAT_LIMIT

if TYPE_CHECKING:
    import xarray as xr

BLOCK = 256
"""The number of series held in memory at a time."""

WATCHED = 64
"""The number of series whose mixing is checked; they are evenly spaced."""


@dataclass(frozen=True)
class LossSeries:
    """Losses (E, N, S), read piece by piece because the array may be in a file.

    Attributes:
        values: (E, N, samples[, tokens]).
        mean_tokens: whether a series is the mean over a sample's tokens.
        dims, shape: of the series.
    """

    values: np.ndarray
    mean_tokens: bool
    dims: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, losses: "xr.DataArray", per_token: bool) -> "LossSeries":
        """The series of an observable.

        Raises:
            ValueError: the dimensions are not chain, draw, sample and optionally token; or there are fewer than two draws.
        """
        dims = tuple(str(dim) for dim in losses.dims)
        if dims not in (("chain", "draw", "sample"), ("chain", "draw", "sample", "token")):
            raise ValueError(
                f"losses has the dimensions {dims}; they must be (chain, draw, sample) or (chain, draw, sample, token)"
            )
        if per_token and "token" not in dims:
            raise ValueError("per_token needs losses per token; these are per sample")
        if losses.sizes["draw"] < 2:
            raise ValueError("a covariance needs at least two draws")
        tokens = "token" in dims and not per_token
        own = dims[2:3] if tokens else dims[2:]
        return cls(losses.values, tokens, own, tuple(losses.sizes[dim] for dim in own))

    @property
    def chains(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def draws(self) -> int:
        """N."""
        return self.values.shape[1]

    @property
    def size(self) -> int:
        """S."""
        return int(np.prod(self.shape))

    def blocks(self) -> Iterator[slice]:
        """Slices of BLOCK series that together cover all series."""
        for start in range(0, self.size, BLOCK):
            yield slice(start, min(start + BLOCK, self.size))

    def columns(self, chosen: slice) -> np.ndarray:
        """(E, N, chosen) in float64."""
        if self.mean_tokens:
            return self.values[:, :, chosen].mean(axis=-1, dtype=np.float64)
        return self.values.reshape(self.chains, self.draws, self.size)[:, :, chosen].astype(np.float64)

    def finite(self) -> np.ndarray:
        """(E,) chains without a bad loss."""
        good = np.ones(self.chains, dtype=bool)
        for chosen in self.blocks():
            good &= np.isfinite(self.columns(chosen)).all(axis=(1, 2))
        return good

    def mean(self, kept: np.ndarray) -> np.ndarray:
        """(E', N) the mean of all series, of the kept chains."""
        total = sum(self.columns(chosen)[kept].sum(axis=-1) for chosen in self.blocks())
        return np.asarray(total) / self.size


def kept_chains(*series: LossSeries) -> np.ndarray:
    """(E,) the chains without a bad loss in any of the series.

    Raises:
        ValueError: the series have different chains or draws, or no chain is left.
    """
    first = series[0]
    if any((each.chains, each.draws) != (first.chains, first.draws) for each in series):
        raise ValueError("the losses were not taken at the same draws: their chains or draws differ in number")
    kept = np.logical_and.reduce([each.finite() for each in series])
    if not kept.any():
        raise ValueError(
            "every chain has a loss that is not finite, so that nothing is known of the posterior; see the estimate's verdict"
        )
    return kept


@dataclass(frozen=True)
class Parts:
    """The independent parts of so many draws (`icl.sampling.diagnostics.independent_parts`)."""

    places: tuple[tuple[int, slice], ...]

    @classmethod
    def of(cls, chains: int, draws: int) -> "Parts":
        """The parts of (E, N)."""
        return cls(tuple(independent_parts(chains, draws)))

    @property
    def weights(self) -> np.ndarray:
        """(U,) each part's share of all draws; almost equal."""
        lengths = np.array([place.stop - place.start for _, place in self.places], dtype=np.float64)
        return lengths / lengths.sum()

    def means(self, values: np.ndarray) -> np.ndarray:
        """(U, ...) each part's mean of values (E, N, ...)."""
        return np.stack([values[chain, place].mean(axis=0) for chain, place in self.places])

    def mean_products(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(U, a, b) each part's mean product of (E, N, a) and (E, N, b)."""
        return np.stack([
            left[chain, place].T @ right[chain, place] / (place.stop - place.start) for chain, place in self.places
        ])  # fmt: skip


def error_of_mean(parts: np.ndarray) -> np.ndarray:
    """The standard error of the mean of independent parts (U, ...), with Student's factor; NaN for one."""
    count = len(parts)
    if count < 2:
        return np.full(parts.shape[1:], np.nan)
    return parts.std(axis=0, ddof=1) / np.sqrt(count) * student_factor(count - 1)


def mixing_problems(kept: np.ndarray, *series: LossSeries) -> Iterator[str]:
    """What is wrong with the chains of some series, as sentences of a verdict: lost ones, disagreement, too few independent draws."""
    if lost := int((~kept).sum()):
        yield f"{lost} of {len(kept)} chains diverged: smaller epsilon"
    rhats, sizes = [1.0], [np.inf]
    for each in series:
        for place in range(0, each.size, max(1, each.size // WATCHED)):
            draws = torch.from_numpy(each.columns(slice(place, place + 1))[kept, :, 0])
            if float(draws.std()) > 0.0:
                rhats.append(split_rhat(draws))
                sizes.append(bulk_ess(draws))
    rhat, ess = np.max(rhats), np.min(sizes)  # NaN if any is
    if np.isnan(rhat) or np.isnan(ess):
        yield "too few draws to compare chains: more draws"
    if rhat > RHAT_LIMIT:
        yield f"chains disagree on a sample's loss: split R-hat {rhat:.3f} is above {RHAT_LIMIT} (more draws, more burn-in)"
    if ess < ESS_LIMIT:
        yield f"too few independent draws of a sample's loss: {ess:.0f}, below {ESS_LIMIT:.0f} (more draws)"
