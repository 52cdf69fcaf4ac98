"""devinterp's samplers on models of known coefficient.

Its `SGMCMC` optimiser drives all chains as one stacked tensor, whose update is elementwise and therefore the same as chain by chain, on the
gradients that icl's samplers use. devinterp has no setting of its own for models of different sizes, so one is chosen in its favour: the
cell of a grid with the smallest mean error, capped at 1, on tuning models of the same families.
"""

import math
import warnings

import torch

from icl.sampling import SamplerConfig
from icl.sampling.diagnostics import mcse_of_mean, split_rhat
from icl.sampling.truth import KnownModel, deep_linear, linear_regression

GRIDS = {
    "devinterp sgld": [(lr, gamma) for lr in (1e-6, 3e-6, 1e-5, 3e-5) for gamma in (1.0, 10.0, 100.0)],
    "devinterp rmsprop_sgld": [(lr, gamma) for lr in (1e-6, 3e-6, 1e-5, 3e-5) for gamma in (1.0, 10.0, 100.0)],
}


def devinterp_estimate(
    model: KnownModel, method: str, lr: float, gamma: float, gradients: int, config: SamplerConfig
) -> dict[str, float | str]:
    """One row of devinterp's sampler; the share of burn-in among its steps is icl's."""
    from devinterp.optim import SGMCMC

    nbeta, chains = config.inverse_temperature, config.num_chains
    objective = model.objective()
    weights = torch.nn.Parameter(objective.anchor.expand(chains, -1).clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimiser = SGMCMC.get_method(method.removeprefix("devinterp "))(
            [weights], lr=lr, nbeta=nbeta, localization=gamma
        )
    generator = torch.Generator().manual_seed(0)
    steps = gradients // chains
    burnin = round(steps * config.num_burnin_steps / config.num_steps)
    init = float(objective.losses(objective.anchor[None], model.batch))
    losses = torch.empty(chains, steps)
    for step in range(steps):
        loss, gradient = objective.losses_and_gradients(weights.detach(), model.batch, None)
        losses[:, step] = loss[:, 0]
        weights.grad = gradient
        optimiser.step(noise_generator=generator)
    excess = nbeta * (losses[:, burnin:].double() - init)
    lost = ~torch.isfinite(excess).all(dim=1)
    good = excess[~lost]
    alive = len(good) > 0
    return {
        "estimate": float(good.mean()) if alive else math.nan, "mcse": mcse_of_mean(good) if alive else math.nan,
        "rhat": split_rhat(good) if alive else math.nan, "ess": math.nan, "gradients": steps * chains, "gamma": gamma,
        "epsilon": lr, "lost": int(lost.sum()), "verdict": "",
    }  # fmt: skip


def choose_in_hindsight(method: str, config: SamplerConfig, budget: int) -> tuple[float, float]:
    """devinterp's (lr, localization) with the smallest mean |relative error|, capped at 1, on models that are not in the zoo."""
    tuning = [linear_regression(23, 7), deep_linear((17, 11, 13), 3, 7), deep_linear((13, 19, 7, 17), 2, 7)]

    def error(cell: tuple[float, float]) -> float:
        rows = [devinterp_estimate(model, method, *cell, budget, config)["estimate"] for model in tuning]
        errors = [abs(float(row) / model.coefficient - 1) for row, model in zip(rows, tuning, strict=True)]
        return sum(min(value, 1.0) if math.isfinite(value) else 1.0 for value in errors) / len(errors)

    return min(GRIDS[method], key=error)
