r"""How samples depend on each other: covariances of their losses over draws of the localised posterior.

With losses ℓ_i(w) of samples i at draws w of p(w) ∝ exp(−nβ L(w) − (γ/2)‖w − w*‖²),

    K_ij = Cov(ℓ_i, ℓ_j)                            the loss kernel (Adam, Furman & Hoogland 2025, arXiv 2509.26537)
    ∂E[ℓ_j]/∂β_i = −Cov(ℓ_i, ℓ_j)                   the Bayesian influence function (Kreer et al. 2025, arXiv 2509.26544):
                                                    what a larger weight β_i of sample i does to the expected loss of sample j

The covariance is that of all draws of all chains together. Its standard error comes from the chains' own mean products, which are
independent however slowly a chain moves; with few chains from long stretches of them (`icl.sampling.diagnostics.mcse_of_mean`).

Shapes: E chains, N draws, S samples.
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
"""Samples whose products with as many others are held at a time."""

WATCHED = 64
"""Samples whose mixing is looked at, evenly spaced."""

UNCERTAIN = 0.25
"""A covariance matrix is too uncertain to use where the typical error of its diagonal is above this share of it."""


def influence(losses: "xr.DataArray", others: "xr.DataArray | None" = None, *, per_token: bool = False) -> "xr.Dataset":
    """Covariances and correlations of the losses of samples over all draws.

    Args:
        losses: (chain, draw, sample[, token]), as `LLCResult.observables` holds them.
        others: losses of other samples at the same draws, such as those of queries; None: of the same.
        per_token: between tokens rather than samples, whose loss is the mean over its tokens.

    Returns:
        Over (sample, sample_2), or (sample, token, sample_2, token_2): `covariance` in squared units of the loss, `mcse` its Monte-Carlo
        standard error, `correlation`, and `correlation_mcse`. The influence of sample i on sample_2 j is minus the covariance. The
        attribute `verdict` says how far to trust them; `resolved` is the share of pairs that are two errors from 0.
        Chains with a loss that is not finite are left out.

    Raises:
        ValueError: losses without the dimensions chain, draw, sample, or at different draws; no finite chain; fewer than two draws.
    """
    import xarray as xr

    first = _Series.of(losses, per_token)
    second = first if others is None else _Series.of(others, per_token)
    if (first.chains, first.draws) != (second.chains, second.draws):
        raise ValueError("losses and others were not taken at the same draws: their chains or draws differ in number")
    kept = first.finite & second.finite
    if not kept.any():
        raise ValueError(
            "every chain has a loss that is not finite, so that nothing is known of the posterior; see the estimate's verdict"
        )
    parts = list(independent_parts(int(kept.sum()), first.draws))
    shape = (first.size, second.size)
    found = {name: np.empty(shape) for name in ("covariance", "mcse", "correlation", "correlation_mcse")}
    spreads = [_variances(each, kept, parts) for each in (first, second)]
    for rows in _blocks(first.size):
        left = first.centred(rows, kept)
        for columns in _blocks(second.size):
            right = left if second is first and rows == columns else second.centred(columns, kept)
            products = _part_means(left, right, parts)
            block = _summaries(products, spreads[0][:, rows], spreads[1][:, columns], _weights(parts))
            for name, values in zip(found, block, strict=True):
                found[name][rows, columns] = values
    if second is first:
        np.fill_diagonal(found["correlation"], np.where(np.diag(found["correlation"]) > 0, 1.0, np.nan))
    dims = (*first.dims, *(f"{dim}_2" for dim in second.dims))
    coords = {
        **{dim: losses[dim].values for dim in first.dims if dim in losses.coords},
        **{f"{dim}_2": (losses if others is None else others)[dim].values for dim in second.dims},
    }
    with np.errstate(invalid="ignore"):
        resolved = float((np.abs(found["covariance"]) > 2 * found["mcse"]).mean())
    text = _verdict(first, second, kept, spreads, losses.attrs)
    return xr.Dataset(
        {name: (dims, values.reshape(*first.shape, *second.shape)) for name, values in found.items()},
        coords=coords,
        attrs={
            "verdict": text, "resolved": resolved, "chains": int(kept.sum()), "draws": first.draws,
            "formula": "covariance: Cov(l_i, l_j) over the draws of all chains; the influence of i on j is minus that",
            "source": "arXiv 2509.26544, 2509.26537",
        },
    )  # fmt: skip


def loss_kernel(losses: "xr.DataArray", *, per_token: bool = False, components: int = 8) -> "xr.Dataset":
    """The loss kernel of samples, normalised: similarity as the model sees it (Adam, Furman & Hoogland 2025, arXiv 2509.26537).

        k_ij = K_ij / √(K_ii K_jj),    K = Cov(ℓ_i, ℓ_j)

    Returns:
        `influence(losses)`, and from the normalised kernel k: `eigenvalue` (component), the largest ones in falling order, and `feature`
        (sample, component), √eigenvalue times the eigenvector, whose inner products give k back; to draw or to cluster samples by.
        Samples whose loss does not move have no place: their features are 0.
    """
    found = influence(losses, per_token=per_token)
    dims = found["correlation"].dims[: found["correlation"].ndim // 2]
    shape = [found.sizes[dim] for dim in dims]
    size = int(np.prod(shape))
    matrix = np.nan_to_num(found["correlation"].values.reshape(size, size))
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    chosen = np.argsort(values)[::-1][: min(components, size)]
    features = vectors[:, chosen] * np.sqrt(values[chosen].clip(min=0))
    return found.assign(
        eigenvalue=("component", values[chosen]), feature=((*dims, "component"), features.reshape(*shape, len(chosen)))
    )


@dataclass(frozen=True)
class _Series:
    """Losses as S series (E, N, S), read piece by piece: an array may lie on a disk."""

    values: np.ndarray
    mean_tokens: bool
    dims: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, losses: "xr.DataArray", per_token: bool) -> "_Series":
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
        return self.values.shape[0]

    @property
    def draws(self) -> int:
        return self.values.shape[1]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def columns(self, chosen: slice) -> np.ndarray:
        """(E, N, chosen) in float64."""
        if self.mean_tokens:
            return self.values[:, :, chosen].mean(axis=-1, dtype=np.float64)
        return self.values.reshape(self.chains, self.draws, self.size)[:, :, chosen].astype(np.float64)

    def centred(self, chosen: slice, kept: np.ndarray) -> np.ndarray:
        """The same of the kept chains, less the mean over all draws."""
        values = self.columns(chosen)[kept]
        return values - values.mean(axis=(0, 1))

    @property
    def finite(self) -> np.ndarray:
        """(E,) chains without a bad loss."""
        good = np.ones(self.chains, dtype=bool)
        for chosen in _blocks(self.size):
            good &= np.isfinite(self.columns(chosen)).all(axis=(1, 2))
        return good


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def _part_means(left: np.ndarray, right: np.ndarray, parts: list[tuple[int, slice]]) -> np.ndarray:
    """(U, a, b): each part's mean product of centred series (E, N, a) and (E, N, b), times EN/(EN − 1)."""
    total = left.shape[0] * left.shape[1]
    means = [left[chain, place].T @ right[chain, place] / (place.stop - place.start) for chain, place in parts]
    return np.stack(means) * (total / (total - 1))


def _variances(series: _Series, kept: np.ndarray, parts: list[tuple[int, slice]]) -> np.ndarray:
    """(U, S): each part's mean square of the centred series, times EN/(EN − 1)."""
    found = np.empty((len(parts), series.size))
    total = int(kept.sum()) * series.draws
    for chosen in _blocks(series.size):
        values = series.centred(chosen, kept)
        for unit, (chain, place) in enumerate(parts):
            found[unit, chosen] = np.square(values[chain, place]).mean(axis=0) * total / (total - 1)
    return found


def _weights(parts: list[tuple[int, slice]]) -> np.ndarray:
    """(U,) each part's share of all draws: almost equal."""
    lengths = np.array([place.stop - place.start for _, place in parts], dtype=np.float64)
    return lengths / lengths.sum()


def _summaries(products: np.ndarray, left: np.ndarray, right: np.ndarray, weights: np.ndarray) -> Iterator[np.ndarray]:
    """Covariance, its error, correlation and its error (a, b), of the parts' products (U, a, b), variances (U, a), (U, b) and weights (U,).

    The error of r = c_ij / √(c_ii c_jj) is that of its
    linear part, r (δc_ij/c_ij − δc_ii/2c_ii − δc_jj/2c_jj).
    """
    covariance = np.tensordot(weights, products, 1)
    yield covariance
    yield _error(products)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(np.outer(weights @ left, weights @ right))
        correlation = covariance / scale
        relative = (left / (weights @ left))[:, :, None] + (right / (weights @ right))[:, None, :]
        yield correlation
        yield _error(products / scale - correlation * relative / 2)


def _error(values: np.ndarray) -> np.ndarray:
    """The standard error of the mean of independent parts (U, ...); NaN for one."""
    count = len(values)
    if count < 2:
        return np.full(values.shape[1:], np.nan)
    return values.std(axis=0, ddof=1) / np.sqrt(count) * student_factor(count - 1)


def _verdict(first: _Series, second: _Series, kept: np.ndarray, spreads: list[np.ndarray], attributes: dict) -> str:
    """What is wrong with these covariances, or "healthy"."""
    problems = [f"{lost} of {len(kept)} chains diverged: smaller epsilon"] if (lost := int((~kept).sum())) else []
    rhat, ess = 1.0, np.inf
    for series in (first,) if second is first else (first, second):
        step = max(1, series.size // WATCHED)
        for place in range(0, series.size, step):
            draws = torch.from_numpy(series.columns(slice(place, place + 1))[kept, :, 0])
            if float(draws.std()) == 0.0:
                continue
            rhat, ess = max(rhat, split_rhat(draws)), min(ess, bulk_ess(draws))
    if rhat > RHAT_LIMIT:
        problems.append(
            f"chains disagree on a sample's loss: split R-hat {rhat:.3f} is above {RHAT_LIMIT} (more draws, more burn-in)"
        )
    if ess < ESS_LIMIT:
        problems.append(f"too few independent draws of a sample's loss: {ess:.0f}, below {ESS_LIMIT:.0f} (more draws)")
    errors = np.concatenate([_error(each) / np.maximum(each.mean(axis=0), 1e-300) for each in spreads])
    if np.isnan(errors).all():
        problems.append("no standard errors: too few draws")
    elif (typical := float(np.nanmedian(errors))) > UNCERTAIN:
        times = (typical / UNCERTAIN) ** 2
        problems.append(
            f"too uncertain: variances of losses are known to {typical:.0%} (about {times:.2g} times the draws)"
        )
    own = str(attributes.get("verdict", "healthy"))
    if own != "healthy":
        problems.append(f"of the chains: {own}")
    return "; ".join(problems) or "healthy"
