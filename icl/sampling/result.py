"""The record of an estimate: the number, its uncertainty, its health, and what it was made from.

Shapes: E chains, N draws, T losses of one batch (tokens; 1 for a scalar loss).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from icl.sampling.chains import ChainRun
from icl.sampling.checks import control_acceptance
from icl.sampling.config import SamplerConfig
from icl.sampling.diagnostics import bulk_ess, mcse_of_mean, split_rhat
from icl.sampling.observables import WeightTrace
from icl.sampling.tuning import Tuned
from icl.sampling.verdict import Verdict, judge


@dataclass(frozen=True)
class LLCResult:
    """An estimate, what it was made from, and whether to trust it. All means leave out the chains that were lost.

    Attributes:
        llc_mean: λ̂.
        llc_std: standard deviation over chains of their own λ̂ (0 for one chain).
        llc_mcse: Monte-Carlo standard error of λ̂.
        llc_per_chain: (E,), NaN for a lost chain.
        llc_per_token: (T,) λ̂_t = nβ(E ℓ_t − ℓ_t(w*)); its mean is λ̂.
        wbic: n E[L].
        init_loss: L(w*).
        mean_loss: E[L].
        loss_trace: (E, N) loss at each draw.
        batch_loss_trace: (E, N) loss on the gradient's batch at each draw; the same as `loss_trace` for `eval_method` "grad-minibatch".
        excess_trace: (E, N) nβ(L − L(w*)) at each draw, with w* on the same batch where the two were paired.
        token_loss_trace: (E, N, T).
        rhat, ess: split R-hat and bulk effective sample size of `loss_trace`; `llc_rhat` and `llc_ess` of `excess_trace`, from which the
            noise that all chains share through the batch has been removed.
        distances: (E, N) ‖w − w*‖.
        lost_at: (E,) the draw at which a chain ceased to be finite, N for a healthy one.
        control_acceptance: Metropolis acceptance of one step at nβ = 0 (`icl.sampling.verdict`).
        num_samples: n, of WBIC and nβ.
        nbeta, seed, config: as used, with the step size and localisation that were found: `config` again repeats the run.
        noise_heating: what the noise of the gradient's batches adds to λ̂, to first order (`icl.sampling.verdict.noise_heating`).
        verdict: in words.
        tuned: what the pilot chains found, if they ran.
        weights: w − w* at the draws, where `eval_metrics` asks for weights or covariance.
        singular_fluctuation: ν̂ (`icl.sampling.observables`), where `eval_metrics` asks for it.
    """

    llc_mean: float
    llc_std: float
    llc_mcse: float
    llc_per_chain: Tensor
    llc_per_token: Tensor
    wbic: float
    init_loss: float
    mean_loss: float
    loss_trace: Tensor
    batch_loss_trace: Tensor
    excess_trace: Tensor
    token_loss_trace: Tensor
    rhat: float
    ess: float
    llc_rhat: float
    llc_ess: float
    distances: Tensor
    lost_at: Tensor
    control_acceptance: float
    num_samples: int
    nbeta: float
    seed: int
    config: SamplerConfig
    noise_heating: float
    verdict: Verdict
    tuned: Tuned | None
    weights: WeightTrace | None = None
    singular_fluctuation: float | None = None

    @property
    def num_lost(self) -> int:
        """Chains that became NaN or infinite."""
        return int((self.lost_at < self.loss_trace.shape[1]).sum())

    @property
    def distance(self) -> float:
        """‖w − w*‖ at the last draw, averaged over healthy chains."""
        return float(self.distances[self.lost_at == self.loss_trace.shape[1], -1].mean())

    @property
    def running(self) -> Tensor:
        """(E, N) each chain's λ̂ from its draws 0..t: what `eval_online` reports."""
        draws = torch.arange(1, self.excess_trace.shape[1] + 1, device=self.excess_trace.device)
        return self.excess_trace.cumsum(dim=1) / draws

    def summary(self) -> dict[str, float | str]:
        """One flat row for a table, in the column names of the shipped results; `batch-loss/...` where the metric is asked for."""
        row: dict[str, float | str] = {
            "llc/mean": self.llc_mean, "llc/std": self.llc_std, "llc/mcse": self.llc_mcse, "llc/rhat": self.llc_rhat,
            "llc/ess": self.llc_ess, "loss/init": self.init_loss, "loss/mean": self.mean_loss,
            "loss/excess": self.mean_loss - self.init_loss, "noise/heating": self.noise_heating,
            "wbic/mean": self.wbic, "distance": self.distance, "chains/lost": self.num_lost,
            "acceptance/control": self.control_acceptance, "verdict": self.verdict.text,
        }  # fmt: skip
        if len(self.llc_per_token) > 1:
            row |= {f"llc/mean/{t}": value for t, value in enumerate(self.llc_per_token.tolist())}
        if self.singular_fluctuation is not None:
            row["singular_fluctuation"] = self.singular_fluctuation
        if "batch-loss" in self.config.eval_metrics:
            healthy = self.batch_loss_trace[self.lost_at == self.loss_trace.shape[1]]
            row |= {"batch-loss/mean": float(healthy.mean()), "batch-loss/std": float(healthy.std())}
            for chain, losses in enumerate(self.batch_loss_trace):
                row |= {
                    f"batch-loss/chain-{chain}/mean": float(losses.mean()),
                    f"batch-loss/chain-{chain}/std": float(losses.std()),
                }
        return row


def summarise_chains(
    config: SamplerConfig,
    run: ChainRun,
    init: Tensor,
    *,
    seed: int,
    reference_loss: float | None = None,
    noise_heating: float = 0.0,
    tuned: Tuned | None = None,
    weights: WeightTrace | None = None,
    singular_fluctuation: float | None = None,
) -> LLCResult:
    """Estimates and diagnostics of chains whose w* had losses `init` (E, N, T).

    Raises:
        ValueError: a loss of w* is not finite.
    """
    nbeta, healthy = config.inverse_temperature, run.healthy
    losses, init = run.losses.double(), init.double()
    if not bool(torch.isfinite(init).all()):
        raise ValueError("the loss of w* is not finite; the weights given are no minimum of anything")
    excess = nbeta * (losses - init)
    trace, loss_trace = excess.mean(dim=-1), losses.mean(dim=-1)
    per_chain = torch.where(healthy, trace.mean(dim=1), math.nan)
    good, good_loss = trace[healthy], loss_trace[healthy]
    alive = len(good) > 0
    mean_loss = float(good_loss.mean()) if alive else math.nan
    mcse = mcse_of_mean(good) if alive else math.nan
    rhat, ess = (split_rhat(good), bulk_ess(good)) if alive else (math.nan, 0.0)
    verdict = judge(
        good,
        num_lost=int((~healthy).sum()),
        rhat=rhat,
        ess=ess,
        mcse=mcse,
        mean_loss=mean_loss,
        init_loss=float(init.mean()),
        reference_loss=reference_loss,
        noise_heating=noise_heating,
    )
    size = run.positions.shape[1]
    return LLCResult(
        llc_mean=float(good.mean()) if alive else math.nan,
        llc_std=float(per_chain[healthy].std()) if len(good) > 1 else 0.0,
        llc_mcse=mcse,
        llc_per_chain=per_chain,
        llc_per_token=excess[healthy].mean(dim=(0, 1)),
        wbic=config.eval_dataset_size * mean_loss,
        init_loss=float(init.mean()),
        mean_loss=mean_loss,
        loss_trace=loss_trace,
        batch_loss_trace=run.batch_losses.double().mean(dim=-1),
        excess_trace=trace,
        token_loss_trace=losses,
        rhat=split_rhat(good_loss) if alive else math.nan,
        ess=bulk_ess(good_loss) if alive else 0.0,
        llc_rhat=rhat,
        llc_ess=ess,
        distances=run.distances,
        lost_at=run.lost_at,
        control_acceptance=control_acceptance(config.step_size or 0.0, config.localization, size),
        num_samples=config.eval_dataset_size,
        nbeta=nbeta,
        seed=seed,
        config=config,
        noise_heating=noise_heating,
        verdict=verdict,
        tuned=tuned,
        weights=weights,
        singular_fluctuation=singular_fluctuation,
    )
