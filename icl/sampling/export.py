"""Export of an estimate's draws to `xarray` and to ArviZ's `InferenceData`, in ArviZ's conventions (chain, draw, ...)."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


def to_xarray(result: Any) -> "xr.Dataset":
    """All draws of an estimate.

    Args:
        result: an `LLCResult`, which calls this.

    Returns:
        Over (chain, draw): `loss`; `llc`, nβ(L − L(w*)), whose mean is λ̂; `distance`, ‖w − w*‖. Over (chain): `healthy`, whether it stayed
        finite. Each observable under its name, over (chain, draw, <name>_sample[, <name>_token]), and the losses of w* on it as
        `<name>_at_w_star`. Attributes: λ̂, its error, nβ, γ, the seed, the verdict.
    """
    import xarray as xr

    pair = ("chain", "draw")
    draws = {
        "loss": (pair, result.loss_trace.numpy()),
        "llc": (pair, result.excess_trace.numpy()),
        "distance": (pair, result.distances.double().numpy()),
        "healthy": (("chain",), result.run.healthy.numpy()),
    }
    chains, length = result.loss_trace.shape
    whole = xr.Dataset(
        draws,
        coords={"chain": np.arange(chains), "draw": np.arange(length)},
        attrs={
            "llc_mean": result.llc_mean, "llc_mcse": result.llc_mcse, "nbeta": result.nbeta, "gamma": result.config.localization,
            "seed": result.seed, "verdict": result.verdict.text,
        },
    )  # fmt: skip
    for name, losses in result.observables.items():
        own = losses.rename({dim: f"{name}_{dim}" for dim in losses.dims[2:]} | {"at_w_star": f"{name}_at_w_star"})
        whole[name] = own.drop_attrs()
    return whole.reset_coords([f"{name}_at_w_star" for name in result.observables])


def to_arviz(result: Any) -> Any:
    """All draws as ArviZ's InferenceData.

    The group `posterior` has the sampled quantities, `sample_stats` the chains' health, and `constant_data` the losses of w*. ArviZ 1.0 has
    no InferenceData; there the result is an `xarray.DataTree` with the same groups.

    Raises:
        ImportError: ArviZ is not installed.
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install 'icl[arviz]'") from error
    whole = to_xarray(result)
    stats = whole[["distance"]].assign(diverging=~whole["healthy"].broadcast_like(whole["loss"]))
    fixed = whole[[f"{name}_at_w_star" for name in result.observables]]
    groups: dict[str, Any] = {
        "posterior": whole.drop_vars(["distance", "healthy", *fixed.data_vars]),
        "sample_stats": stats,
    }
    if fixed.data_vars:
        groups["constant_data"] = fixed
    if hasattr(arviz, "InferenceData"):
        return arviz.InferenceData(attrs=whole.attrs, **groups)
    import xarray as xr

    return xr.DataTree.from_dict(groups)
