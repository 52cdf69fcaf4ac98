"""The record of an estimate: the number, its uncertainty, its health, and what it was made from.

Shapes: E chains, N draws, T losses of one batch (tokens; 1 for a scalar loss).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icl.sampling.chains import ChainRun, Paused
from icl.sampling.checks import control_acceptance
from icl.sampling.config import PUBLISHED_LANGUAGE_ESTIMATOR, SamplerConfig
from icl.sampling.diagnostics import bulk_ess, mcse_of_mean, split_rhat
from icl.sampling.loss_trace import LossTrace
from icl.sampling.needs import Effort, Needs, needs_of
from icl.sampling.observables import WeightTrace
from icl.sampling.online import artefact, online_excess
from icl.sampling.stein import UNKNOWN, Ratio, held_share, mean_ratio, stiff_ratio
from icl.sampling.tuning import Tuned
from icl.sampling.verdict import Evidence, Verdict, judge

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class LLCResult:
    """An estimate, its inputs, and whether to trust it. All means leave out the chains that diverged.

    Attributes:
        run: the record of the chains, with the losses of w* at each draw.
        config: the settings used, including the step size and localisation that the pilot found. They repeat the run.
        seed: the run's seed. `config.noise_law` derives each chain's noise from it.
        noise_heating: what the noise of the gradient's batches adds to λ̂, to first order (`icl.sampling.checks`).
        reference_loss: a loss that no useful model exceeds, if it is known; see `icl.sampling.verdict.judge`.
        init_error: standard error of λ̂ because L(w*) is taken on other batches than the draws (`icl.sampling.init_losses`).
        cost, twin: how much smaller λ̂ is because w* is not the minimum, by two measures (`icl.sampling.checks.cost_of_w_star`).
        unknown_gradient: nβ / N if gradients have their control variate and ḡ is a mean over only N samples of the data (`MeanGradient`),
            otherwise 0. ḡ then has an error δ ~ 1/√N, and nβ δ·(w − w*) moves the chains by −H⁻¹δ. In a regular model whose gradient has
            the covariance H, λ̂ falls by the share nβ / N. In a shuffled pass over n samples it is nβ (1/N − 1/n).
        effort: the steps and batches that the run spent (`icl.sampling.needs`); None for kernels without a formula for their heating.
        tuned: the result of the pilot chains, if they ran.
        paused: the state in which the chains stopped, for `estimate_llc(..., resume=result)`.
        weights: w − w* at the draws, if `eval_metrics` asks for weights or covariance.
        singular_fluctuation: ν̂ (`icl.sampling.observables`), if `eval_metrics` asks for it.
        observed: the observables' values at the draws; the method `observables` returns them.
    """

    run: ChainRun
    config: SamplerConfig
    seed: int
    noise_heating: float = 0.0
    reference_loss: float | None = None
    init_error: float = 0.0
    cost: Ratio = UNKNOWN
    twin: Ratio = UNKNOWN
    unknown_gradient: float = 0.0
    effort: Effort | None = None
    tuned: Tuned | None = None
    paused: Paused | None = None
    weights: WeightTrace | None = None
    singular_fluctuation: float | None = None
    observed: Mapping[str, LossTrace] = field(default_factory=dict)

    # The estimate

    @cached_property
    def llc_mean(self) -> float:
        """λ̂ = nβ (E[L] − L(w*)); NaN if every chain diverged."""
        return float(self.healthy_excess.mean())

    @cached_property
    def llc_mcse(self) -> float:
        """Monte-Carlo standard error of λ̂: that of the chains, and that of L(w*) if it has batches of its own."""
        return math.hypot(mcse_of_mean(self.healthy_excess), self.init_error) if self.any_healthy else math.nan

    @cached_property
    def llc_per_chain(self) -> Tensor:
        """(E,) λ̂ of each chain; NaN for a chain that diverged."""
        return torch.where(self.run.healthy, self.excess_trace.mean(dim=1), math.nan)

    @property
    def llc_std(self) -> float:
        """Standard deviation over chains of their own λ̂; 0 for one chain."""
        healthy = self.llc_per_chain[self.run.healthy]
        return float(healthy.std()) if len(healthy) > 1 else 0.0

    @property
    def llc_corrected(self) -> float:
        """λ̂ minus the artefact of the estimator "published-language" (`icl.sampling.online`); λ̂ itself for the standard estimator."""
        if self.config.estimator != PUBLISHED_LANGUAGE_ESTIMATOR:
            return self.llc_mean
        chains, draws = self.run.losses.shape[:2]
        return self.llc_mean - artefact(self.nbeta, chains, draws, self.init_loss)[0]

    @property
    def llc_per_token(self) -> Tensor:
        """(T,) λ̂_t = nβ(E ℓ_t − ℓ_t(w*)); its mean is λ̂."""
        return self._token_excess[self.run.healthy].mean(dim=(0, 1))

    @property
    def wbic(self) -> float:
        """n E[L]; NaN if n is not known."""
        return math.nan if self.num_samples is None else self.num_samples * self.mean_loss

    @property
    def num_samples(self) -> int | None:
        """n, of WBIC and nβ; None if neither the data nor the settings say it."""
        return self.config.eval_dataset_size if "eval_dataset_size" in self.config.model_fields_set else None

    @property
    def nbeta(self) -> float:
        """nβ."""
        return self.config.inverse_temperature

    # Losses

    @cached_property
    def token_loss_trace(self) -> Tensor:
        """(E, N, T) losses at each draw."""
        return self.run.losses.double()

    @cached_property
    def loss_trace(self) -> Tensor:
        """(E, N) loss at each draw."""
        return self.token_loss_trace.mean(dim=-1)

    @cached_property
    def batch_loss_trace(self) -> Tensor:
        """(E, N) loss on the gradient's batch at each draw; `loss_trace` itself for `eval_method` "grad-minibatch"."""
        return self.run.batch_losses.double().mean(dim=-1)

    @cached_property
    def excess_trace(self) -> Tensor:
        """(E, N) nβ(L − L(w*)) at each draw. If losses were paired, both are taken on the same batch."""
        return self._token_excess.mean(dim=-1)

    @property
    def healthy_excess(self) -> Tensor:
        """(E', N) `excess_trace` of the chains that stayed finite."""
        return self.excess_trace[self.run.healthy]

    @cached_property
    def init_loss(self) -> float:
        """L(w*)."""
        return float(self.run.anchor_losses.double().mean())

    @cached_property
    def mean_loss(self) -> float:
        """E[L]."""
        return float(self.loss_trace[self.run.healthy].mean())

    @property
    def running(self) -> Tensor:
        """(E, N) each chain's λ̂ from its draws 0..t: what `eval_online` reports."""
        draws = torch.arange(1, self.excess_trace.shape[1] + 1, device=self.excess_trace.device)
        return self.excess_trace.cumsum(dim=1) / draws

    # Health

    @cached_property
    def rhat(self) -> float:
        """Split R-hat of `loss_trace`."""
        return split_rhat(self.loss_trace[self.run.healthy]) if self.any_healthy else math.nan

    @cached_property
    def ess(self) -> float:
        """Bulk effective sample size of `loss_trace`."""
        return bulk_ess(self.loss_trace[self.run.healthy]) if self.any_healthy else 0.0

    @cached_property
    def llc_rhat(self) -> float:
        """Split R-hat of `excess_trace`, which is free of the noise that all chains share through the batch."""
        return split_rhat(self.healthy_excess) if self.any_healthy else math.nan

    @cached_property
    def llc_ess(self) -> float:
        """Bulk effective sample size of `excess_trace`."""
        return bulk_ess(self.healthy_excess) if self.any_healthy else 0.0

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the estimate may be trusted, why not, and what it would need."""
        needs = self.needs.text
        return replace(self._judged, text=f"{self._judged.text}; {needs}") if needs else self._judged

    @cached_property
    def needs(self) -> Needs:
        """The steps or the lower batch noise that the estimate would need; empty if it is healthy."""
        if self.effort is None or self._judged.trusted or not self.any_healthy:
            return Needs()
        return needs_of(self.effort, self.llc_mean, self._judged.findings)

    @cached_property
    def _judged(self) -> Verdict:
        return judge(
            self.healthy_excess,
            num_lost=self.num_lost,
            rhat=self.llc_rhat,
            ess=self.llc_ess,
            mcse=self.llc_mcse,
            mean_loss=self.mean_loss,
            init_loss=self.init_loss,
            reference_loss=self.reference_loss,
            noise_heating=self.noise_heating,
            init_error=self.init_error,
            evidence=self.evidence,
        )

    @cached_property
    def evidence(self) -> Evidence:
        """What the tests of the target found."""
        healthy = self.run.healthy
        if not self.any_healthy:
            return Evidence()
        return Evidence(
            stiff=stiff_ratio(self.run.stiff[healthy], self.run.trace[healthy]),
            virial=mean_ratio(self.run.virial[healthy]),
            temperature=mean_ratio(self.run.temperature[healthy]),
            at_box=float(self.run.at_box[healthy].mean()) if self.run.at_box.numel() else 0.0,
            cost=self.cost,
            twin=self.twin,
            sensitivity=self.gamma_sensitivity,
            held=self._held,
            unknown_gradient=self.unknown_gradient,
            pairing=self._pairing,
        )

    @property
    def _held(self) -> Ratio:
        """Unknown where λ̂ is not that of the loss whose curvature the tests measure."""
        if self.config.eval_method != "grad-minibatch" or self.config.estimator == PUBLISHED_LANGUAGE_ESTIMATOR:
            return UNKNOWN
        trace = self.run.trace[self.run.healthy]
        return held_share(self.healthy_excess, trace, self.nbeta, self.config.localization)

    @property
    def _pairing(self) -> Ratio:
        """Unknown if losses are not paired on the gradient's batch, or if the loss has its control variate."""
        paired = self.config.eval_method == "grad-minibatch" and not bool(self.run.corrections.any())
        return mean_ratio(self.run.pairing[self.run.healthy]) if paired else UNKNOWN

    @cached_property
    def gamma_sensitivity(self) -> Ratio:
        """−dλ̂/d log γ = cov(nβ(L − L(w*)), (γ/2)‖w − w*‖²), with its standard error: how much the localisation decides λ̂."""
        away = self.config.localization / 2 * self.distances[self.run.healthy].double().square()
        excess = self.healthy_excess
        terms = (excess - excess.mean()) * (away - away.mean())
        return mean_ratio(terms)

    @cached_property
    def control_acceptance(self) -> float:
        """Metropolis acceptance of one step at nβ = 0 (`icl.sampling.checks`)."""
        size = self.run.positions.shape[1]
        return control_acceptance(self.config.step_size or 0.0, self.config.localization, size)

    @property
    def any_healthy(self) -> bool:
        """Whether any chain stayed finite."""
        return bool(self.run.healthy.any())

    @property
    def lost_at(self) -> Tensor:
        """(E,) the draw at which a chain ceased to be finite, N for a healthy one."""
        return self.run.lost_at

    @property
    def num_lost(self) -> int:
        """Chains that became NaN or infinite."""
        return int((~self.run.healthy).sum())

    @property
    def distances(self) -> Tensor:
        """(E, N) ‖w − w*‖."""
        return self.run.distances

    @property
    def distance(self) -> float:
        """‖w − w*‖ at the last draw, averaged over healthy chains."""
        return float(self.distances[self.run.healthy, -1].mean())

    # What leaves the library

    @cached_property
    def observables(self) -> "dict[str, xr.DataArray]":
        """Losses of the named data at every draw, (chain, draw, sample[, token]); those of w* are the coordinate `at_w_star`."""
        attributes = {"nbeta": self.nbeta, "gamma": self.config.localization, "verdict": self.verdict.text}
        return {name: trace.array(**attributes) for name, trace in self.observed.items()}

    def to_xarray(self) -> "xr.Dataset":
        """All draws, in one `xarray.Dataset` (`icl.sampling.export`)."""
        from icl.sampling.export import to_xarray

        return to_xarray(self)

    def to_arviz(self) -> Any:
        """All draws as ArviZ takes them, for its plots (`icl.sampling.export`).

        Raises:
            ImportError: ArviZ is not installed.
        """
        from icl.sampling.export import to_arviz

        return to_arviz(self)

    @cached_property
    def _token_excess(self) -> Tensor:
        """(E, N, T)"""
        if self.config.estimator == PUBLISHED_LANGUAGE_ESTIMATOR:
            return self.nbeta * online_excess(self.token_loss_trace)
        paired = self.token_loss_trace - self.run.anchor_losses.double()
        return self.nbeta * (paired - self.run.corrections.double()[:, :, None])

    def summary(self) -> dict[str, float | str]:
        """One flat row for a table, in the column names of the shipped results; `batch-loss/...` where the metric is asked for."""
        row: dict[str, float | str] = {
            "llc/mean": self.llc_mean, "llc/std": self.llc_std, "llc/mcse": self.llc_mcse, "llc/rhat": self.llc_rhat,
            "llc/ess": self.llc_ess, "loss/init": self.init_loss, "loss/mean": self.mean_loss,
            "loss/excess": self.mean_loss - self.init_loss, "noise/heating": self.noise_heating,
            "wbic/mean": self.wbic, "distance": self.distance, "chains/lost": self.num_lost,
            "acceptance/control": self.control_acceptance, "gamma": self.config.localization,
            "verdict": self.verdict.text,
        }  # fmt: skip
        evidence = self.evidence
        tests = {
            "test/stiff": evidence.stiff, "test/virial": evidence.virial, "test/minimum": evidence.cost,
            "gamma/sensitivity": evidence.sensitivity,
        }  # fmt: skip
        if self.config.estimator == PUBLISHED_LANGUAGE_ESTIMATOR:
            row |= {"llc/corrected": self.llc_corrected}
        row |= {name: ratio.value for name, ratio in tests.items() if not math.isnan(ratio.value)}
        if len(self.llc_per_token) > 1:
            row |= {f"llc/mean/{t}": value for t, value in enumerate(self.llc_per_token.tolist())}
        if self.num_samples is None:
            del row["wbic/mean"]
        if self.singular_fluctuation is not None:
            row["singular_fluctuation"] = self.singular_fluctuation
        if "batch-loss" in self.config.eval_metrics:
            healthy = self.batch_loss_trace[self.run.healthy]
            row |= {"batch-loss/mean": float(healthy.mean()), "batch-loss/std": float(healthy.std())}
            for chain, losses in enumerate(self.batch_loss_trace):
                row |= {
                    f"batch-loss/chain-{chain}/mean": float(losses.mean()),
                    f"batch-loss/chain-{chain}/std": float(losses.std()),
                }
        return row
