r"""Influence between samples: covariances of their losses over draws from the localised posterior.

With losses ℓ_i(w) of samples i at draws w of p(w) ∝ exp(−nβ L(w) − (γ/2)‖w − w*‖²),

    K_ij = Cov(ℓ_i, ℓ_j)                            the loss kernel (Adam, Furman & Hoogland 2025, arXiv 2509.26537)
    ∂E[ℓ_j]/∂β_i = −Cov(ℓ_i, ℓ_j)                   the Bayesian influence function (Kreer et al. 2025, arXiv 2509.26544):
                                                    what a larger weight β_i of sample i does to the expected loss of sample j

The covariance is taken over all draws of all chains together. Its standard error comes from the mean products of each chain. These are
independent, however slowly a chain moves. With few chains, the mean products of long stretches are used
(`icl.sampling.diagnostics.mcse_of_mean`).

Shapes: E chains, N draws, S samples.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from icl.sampling.series import LossSeries, Parts, error_of_mean, kept_chains, mixing_problems

if TYPE_CHECKING:
    import xarray as xr

UNCERTAIN = 0.25
"""A covariance matrix is too uncertain if the typical relative error of its diagonal is above this."""


def influence(losses: "xr.DataArray", others: "xr.DataArray | None" = None, *, per_token: bool = False) -> "xr.Dataset":
    """Covariances and correlations of the losses of samples over all draws.

    Args:
        losses: (chain, draw, sample[, token]), as `LLCResult.observables` holds them.
        others: losses of other samples at the same draws, such as queries; None: the same samples.
        per_token: whether covariances are between tokens. Otherwise they are between samples, whose loss is the mean over tokens.

    Returns:
        Over (sample, sample_2), or (sample, token, sample_2, token_2): `covariance` in squared units of the loss, `mcse` its Monte-Carlo
        standard error, `correlation`, and `correlation_mcse`. The influence of sample i on sample_2 j is minus the covariance. The
        attribute `verdict` says how far to trust them; `resolved` is the share of pairs that are two errors from 0.
        Chains with a loss that is not finite are left out.

    Raises:
        ValueError: the losses lack the dimensions chain, draw and sample, or are at different draws; no chain is finite; or there are
            fewer than two draws.
    """
    import xarray as xr

    first = LossSeries.of(losses, per_token)
    second = first if others is None else LossSeries.of(others, per_token)
    kept = kept_chains(first, second)
    parts = Parts.of(int(kept.sum()), first.draws)
    found = {
        name: np.empty((first.size, second.size)) for name in ("covariance", "mcse", "correlation", "correlation_mcse")
    }
    spreads = [_variances(each, kept, parts) for each in (first, second)]
    for rows in first.blocks():
        left = _centred(first, rows, kept)
        for columns in second.blocks():
            right = left if second is first and rows == columns else _centred(second, columns, kept)
            block = _summaries(
                parts, _unbiased(parts.mean_products(left, right), left), spreads[0][:, rows], spreads[1][:, columns]
            )
            for values, own in zip(found.values(), block, strict=True):
                values[rows, columns] = own
    if second is first:
        np.fill_diagonal(found["correlation"], np.where(np.diag(found["correlation"]) > 0, 1.0, np.nan))
        np.fill_diagonal(found["correlation_mcse"], 0.0)
    dims = (*first.dims, *(f"{dim}_2" for dim in second.dims))
    coords = {
        **{dim: losses[dim].values for dim in first.dims if dim in losses.coords},
        **{f"{dim}_2": (losses if others is None else others)[dim].values for dim in second.dims},
    }
    with np.errstate(invalid="ignore"):
        resolved = float((np.abs(found["covariance"]) > 2 * found["mcse"]).mean())
    series = (first,) if second is first else (first, second)
    problems = [*mixing_problems(kept, *series), *_uncertainty(spreads, parts)]
    verdict = str(losses.attrs.get("verdict", "healthy"))
    problems += [] if verdict == "healthy" else [f"of the chains: {verdict}"]
    return xr.Dataset(
        {name: (dims, values.reshape(*first.shape, *second.shape)) for name, values in found.items()},
        coords=coords,
        attrs={
            "verdict": "; ".join(problems) or "healthy", "resolved": resolved, "chains": int(kept.sum()), "draws": first.draws,
            "formula": "covariance: Cov(l_i, l_j) over the draws of all chains; the influence of i on j is minus that",
            "source": "arXiv 2509.26544, 2509.26537",
        },
    )  # fmt: skip


def loss_kernel(losses: "xr.DataArray", *, per_token: bool = False, components: int = 8) -> "xr.Dataset":
    """The normalised loss kernel of samples, a similarity between them (Adam, Furman & Hoogland 2025, arXiv 2509.26537).

        k_ij = K_ij / √(K_ii K_jj),    K = Cov(ℓ_i, ℓ_j)

    Returns:
        `influence(losses)`, and from the normalised kernel k: `eigenvalue` (component), the largest in descending order, and `feature`
        (sample, component), √eigenvalue times the eigenvector. Inner products of features approximate k, so features can be plotted or
        clustered. Samples whose loss does not vary have features 0.
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


def _centred(series: LossSeries, chosen: slice, kept: np.ndarray) -> np.ndarray:
    """The losses (E', N, chosen) of the kept chains, minus the mean over all draws."""
    values = series.columns(chosen)[kept]
    return values - values.mean(axis=(0, 1))


def _unbiased(products: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean products of EN centred draws, for a covariance: times EN / (EN − 1)."""
    total = draws.shape[0] * draws.shape[1]
    return products * (total / (total - 1))


def _variances(series: LossSeries, kept: np.ndarray, parts: Parts) -> np.ndarray:
    """(U, S): the variances in each part."""
    found = []
    for chosen in series.blocks():
        values = _centred(series, chosen, kept)
        found.append(_unbiased(parts.means(np.square(values)), values))
    return np.concatenate(found, axis=1)


def _summaries(parts: Parts, products: np.ndarray, left: np.ndarray, right: np.ndarray) -> Iterator[np.ndarray]:
    """Covariance, its error, correlation and its error (a, b), of the parts' products (U, a, b) and variances (U, a), (U, b).

    The error of r = c_ij / √(c_ii c_jj) is that of its linear part, r (δc_ij/c_ij − δc_ii/2c_ii − δc_jj/2c_jj).
    """
    weights = parts.weights
    covariance = np.tensordot(weights, products, 1)
    yield covariance
    yield error_of_mean(products)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(np.outer(weights @ left, weights @ right))
        correlation = covariance / scale
        relative = (left / (weights @ left))[:, :, None] + (right / (weights @ right))[:, None, :]
        yield correlation
        yield error_of_mean(products / scale - correlation * relative / 2)


def _uncertainty(spreads: list[np.ndarray], parts: Parts) -> Iterator[str]:
    """What is wrong with the errors of the variances (U, S)."""
    if len(parts.places) < 2:
        yield "no standard errors: too few draws"
        return
    errors = np.concatenate([error_of_mean(each) / np.maximum(parts.weights @ each, 1e-300) for each in spreads])
    typical = float(np.median(errors))
    if typical > UNCERTAIN:
        times = (typical / UNCERTAIN) ** 2
        yield f"too uncertain: variances of losses are known to {typical:.0%} (about {times:.2g} times the draws)"
