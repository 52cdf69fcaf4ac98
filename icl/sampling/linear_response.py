r"""Susceptibilities: how a part of a model responds to a small shift of its data.

Let the data distribution be q + h (q' − q). Then the loss is L + h ΔL with ΔL = L' − L. To first order, the mean of an observable φ changes
by nβ χ h,

    χ = (1/nβ) ∂E[φ]/∂h = −Cov(φ, ΔL)                 (Baker, Wang, Hoogland & Murfet 2025, arXiv 2504.18274, section 3)

For the whole model φ = L − L(w*). For a part C of it, φ_C is the same with all weights outside C fixed at w*. With means over the draws of
the restricted posterior (E_C) and of the posterior of the whole model (E),

    χ_C = −( E_C[φ ΔL] − E_C[φ] E[ΔL] )                (appendix C.4)

Each sample or token x contributes with its own ΔL(x) = ℓ_x − L, and χ is the mean of the contributions. If χ(x) is negative, changes of the
part that raise the loss raise the loss on x more than average: the part is useful for x.

Shapes: E chains, N draws, S series (samples, or samples × tokens).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from icl.sampling.series import LossSeries, Parts, error_of_mean, kept_chains, mixing_problems

if TYPE_CHECKING:
    import xarray as xr


def susceptibility(
    probe: "xr.DataArray",
    pretraining: "xr.DataArray",
    *,
    full: "tuple[xr.DataArray, xr.DataArray] | None" = None,
    init_loss: float | None = None,
) -> "xr.Dataset":
    """The susceptibility of a model, or of a part of it, to each sample or token of some data.

    Args:
        probe: losses on the new data, (chain, draw, sample[, token]): an observable of the estimate, of the restricted one for a part.
        pretraining: losses on the data that the model was trained on, at the same draws.
        full: probe and pretraining of the estimate of the whole model, if the other two are those of a part. The two estimates must have
            different seeds, because the error assumes that they are independent.
        init_loss: L(w*); None: the mean of `pretraining` at w*.

    Returns:
        Over (sample[, token]): `susceptibility` χ, in squared units of the loss, and `mcse`, its Monte-Carlo standard error. As single
        numbers: `total`, the mean, which is χ of the shift to the new data, and `total_mcse`. The attribute `verdict` says how far to
        trust them.

    Raises:
        ValueError: the losses are at different draws or have other dimensions, or no chain is finite.
    """
    import xarray as xr

    new, old = (LossSeries.of(each, "token" in each.dims) for each in (probe, pretraining))
    kept = kept_chains(new, old)
    level = old.mean(kept)
    phi = level - (_at_w_star(pretraining) if init_loss is None else init_loss)
    parts = Parts.of(*level.shape)
    whole = None if full is None else _Shift.of(new, *full)
    if whole is None:
        phi = phi - phi.mean()  # the covariance is the same, and less noisy
    chi, mcse = np.empty(new.size), np.empty(new.size)
    summed, summed_whole = np.zeros(len(parts.places)), np.zeros(0)
    for chosen in new.blocks():
        shift = new.columns(chosen)[kept] - level[:, :, None]
        mean, means = (shift.mean(axis=(0, 1)), None) if whole is None else whole.of_series(chosen)
        products = parts.means(phi[:, :, None] * (shift - mean))
        chi[chosen], mcse[chosen] = -(parts.weights @ products), error_of_mean(products)
        summed += products.sum(axis=1)
        if means is not None:
            mcse[chosen] = np.hypot(mcse[chosen], abs(phi.mean()) * error_of_mean(means))
            summed_whole = summed_whole + means.sum(axis=1) if summed_whole.size else means.sum(axis=1)
    total_mcse = error_of_mean(summed / new.size)
    if summed_whole.size:
        total_mcse = np.hypot(total_mcse, abs(phi.mean()) * error_of_mean(summed_whole / new.size))
    problems = [*mixing_problems(kept, new, old), *(() if whole is None else whole.problems())]
    estimates = {"the chains": (probe, pretraining), "the whole model's chains": full or ()}
    for name, arrays in estimates.items():
        verdicts = dict.fromkeys(str(each.attrs.get("verdict", "healthy")) for each in arrays)
        problems += [f"of {name}: {verdict}" for verdict in verdicts if verdict != "healthy"]
    return xr.Dataset(
        {
            "susceptibility": (new.dims, chi.reshape(new.shape)),
            "mcse": (new.dims, mcse.reshape(new.shape)),
            "total": ((), float(chi.mean())),
            "total_mcse": ((), float(total_mcse)),
        },
        coords={dim: probe[dim].values for dim in new.dims if dim in probe.coords},
        attrs={
            "verdict": "; ".join(problems) or "healthy", "chains": int(kept.sum()), "draws": new.draws,
            "formula": "chi = -(E_C[phi (l_x - L)] - E_C[phi] E[l_x - L]), phi = L - L(w*)", "source": "arXiv 2504.18274",
        },
    )  # fmt: skip


@dataclass(frozen=True)
class _Shift:
    """ℓ_x − L at the draws of the whole model."""

    new: LossSeries
    old: LossSeries
    kept: np.ndarray

    @classmethod
    def of(cls, series: LossSeries, probe: "xr.DataArray", pretraining: "xr.DataArray") -> "_Shift":
        new, old = (LossSeries.of(each, "token" in each.dims) for each in (probe, pretraining))
        if new.shape != series.shape:
            raise ValueError(
                f"the probe of the whole model has {new.shape} samples and tokens, that of the part {series.shape}; observe the same data"
            )
        return cls(new, old, kept_chains(new, old))

    def of_series(self, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        """Its mean (chosen,), and the means of the parts (U, chosen)."""
        level = self.old.mean(self.kept)
        parts = Parts.of(*level.shape)
        means = parts.means(self.new.columns(chosen)[self.kept] - level[:, :, None])
        return parts.weights @ means, means

    def problems(self) -> Iterator[str]:
        for text in mixing_problems(self.kept, self.new, self.old):
            yield f"of the whole model: {text}"


def _at_w_star(losses: "xr.DataArray") -> float:
    if "at_w_star" not in losses.coords:
        raise ValueError("pretraining has no losses of w* (the coordinate at_w_star); give init_loss")
    return float(losses["at_w_star"].astype(float).mean())
