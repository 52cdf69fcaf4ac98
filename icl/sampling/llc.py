r"""The local learning coefficient and its relatives, with their uncertainty and their health.

With draws w_t of p(w) ∝ exp(−nβ L(w) − (γ/2)‖w − w*‖²),

    λ̂ = nβ ( E[L(w_t)] − L(w*) )        (Lau et al. 2023, arXiv 2308.12108, eq. 3.5)
    WBIC = n E[L(w_t)]                   (Watanabe 2013)
    ν̂ = nβ V / 2,   V = mean_i Var_t ℓ_i(w_t)    (singular fluctuation; Watanabe 2009, with ℓ_i the loss of sample i)

Shapes: E chains, N draws, T losses of one batch (tokens; 1 for a scalar loss).
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from icl.model import InContextRegressionTransformer
from icl.sampling.chains import Progress, run_chains
from icl.sampling.checks import noise_heating
from icl.sampling.config import SamplerConfig
from icl.sampling.objective import Batch, Losses, LossFunction, Objective
from icl.sampling.observables import SingularFluctuation, WeightTrace
from icl.sampling.plan import AnchorLosses, BatchSource, Evaluation, Plan, Recorder
from icl.sampling.presets import AUTOMATIC
from icl.sampling.result import LLCResult, summarise_chains
from icl.sampling.transformer_objective import SequenceLosses, TransformerObjective, make_objective
from icl.sampling.tuning import tune

logger = logging.getLogger(__name__)

TRACE_BYTES = 2**31
"""What a kept weight trace may take where nobody said: the same everywhere, for it decides which draws are kept."""


def estimate_llc(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: BatchSource | Iterable[Batch],
    config: SamplerConfig = AUTOMATIC,
    *,
    eval_batches: BatchSource | Sequence[Batch] | None = None,
    reference_loss: float | None = None,
    sample_objective: Losses | None = None,
    recorders: Sequence[Recorder] = (),
    progress: Progress | None = None,
) -> LLCResult:
    """Estimate the local learning coefficient of a model at its present weights w*, which are left as they are.

    Args:
        model: any `nn.Module`, at w*.
        loss_fn: (predict, batch) -> a scalar, or one loss per token (T,) whose mean is the loss; `predict(*inputs)` runs the module at the
            chain's weights. With `icl.evals.mse_loss` and the library's own transformer the fast path runs.
        batches: step -> batch, or (step, chain seed) -> batch with `independent_batches`; or an iterable, which is cycled.
        config: see `SamplerConfig`; the default finds its own step size.
        eval_batches: what `eval_method` other than "grad-minibatch" evaluates on, as a sequence or as index -> batch; "dataset" needs a
            sequence. None: batches that the gradient has not seen ("new-minibatch"), else `batches` themselves.
        reference_loss: a loss that no useful model exceeds, such as that of predicting zero; chains above it have left the basin.
        sample_objective: one loss per sample (`ModuleObjective` of a loss function that returns a vector), for the metric
            "singular-fluctuation", which is taken on the first evaluation batch. None: for the library's transformer, that of a sequence.
        recorders: called with (draw, weights (E, P), chain indices) at every draw (`icl.sampling.observables`).
        progress: called with (steps done, steps in all).

    L(w*) is taken on the very batches of the draws, so that λ̂ is a mean of paired differences and the noise of the batches cancels; with
    `num_init_loss_batches` it is taken on that many batches instead.

    Raises:
        ValueError: see `ModuleObjective` and `SamplerConfig`; a loss at w* that is not finite.
    """
    objective = make_objective(model, loss_fn, config)
    return estimate_llc_of(
        objective,
        batches,
        config,
        eval_batches=eval_batches,
        reference_loss=reference_loss,
        sample_objective=sample_objective,
        recorders=recorders,
        progress=progress,
    )


def estimate_llc_of(
    objective: Objective,
    batches: BatchSource | Iterable[Batch],
    config: SamplerConfig = AUTOMATIC,
    *,
    eval_batches: BatchSource | Sequence[Batch] | None = None,
    reference_loss: float | None = None,
    sample_objective: Losses | None = None,
    recorders: Sequence[Recorder] = (),
    progress: Progress | None = None,
) -> LLCResult:
    """`estimate_llc` for an objective that is already made; see there."""
    return next(
        _estimate([objective], batches, config, eval_batches, reference_loss, sample_objective, recorders, progress)
    )


def estimate_llcs(
    models: Sequence[InContextRegressionTransformer],
    loss_fn: LossFunction,
    batches: BatchSource,
    config: SamplerConfig,
    *,
    eval_batches: BatchSource | Sequence[Batch] | None = None,
    reference_loss: float | None = None,
    progress: Progress | None = None,
) -> Iterator[LLCResult]:
    """`estimate_llc` of several transformers of one shape under `icl.evals.mse_loss`, all their chains in one batch.

    Each sees the data and the noise of its own estimate, so that results agree to the rounding of batched arithmetic. It pays on
    accelerators; `can_share_a_batch` says for which settings it is possible.

    Raises:
        ValueError: models, a loss or settings that cannot share a batch; or see `estimate_llc`, for the model whose turn it is.
    """
    objectives = [make_objective(model, loss_fn, config) for model in models]
    alike = len({model.shape for model in models}) == 1 and all(
        isinstance(each, TransformerObjective) for each in objectives
    )
    if not alike or not can_share_a_batch(config):
        raise ValueError("these models or settings cannot share a batch; use estimate_llc on one model after the other")
    return _estimate(objectives, batches, config, eval_batches, reference_loss, None, (), progress)


def can_share_a_batch(config: SamplerConfig) -> bool:
    """Whether chains of several models may run as one batch: all weights are sampled, with given constants, on shared data, and nothing
    but losses is recorded."""
    everything = tuple(config.include) == ("**",) and not config.exclude
    metrics = {"likelihood-derived", "batch-loss", "hessian"}
    return (
        everything
        and config.step_size is not None
        and not config.independent_batches
        and metrics >= {*config.eval_metrics}
    )


def _estimate(
    objectives: Sequence[Objective],
    batches: BatchSource | Iterable[Batch],
    config: SamplerConfig,
    eval_batches: BatchSource | Sequence[Batch] | None,
    reference_loss: float | None,
    sample_objective: Losses | None,
    recorders: Sequence[Recorder],
    progress: Progress | None,
) -> Iterator[LLCResult]:
    """One estimate for every objective; they differ in w* alone, and what is recorded besides losses is recorded of a single one."""
    if config.num_burn_in is not None:
        logger.info(
            "num_burn_in=%d is ignored, as in the published runs; num_burnin_steps is the burn-in", config.num_burn_in
        )
    objective, anchors = objectives[0], torch.stack([each.anchor for each in objectives])
    seed = secrets.randbelow(2**31) if config.init_seed is None else config.init_seed
    source = _as_source(batches, config.independent_batches)
    evaluation = _evaluation(config, source, eval_batches)
    trace = None
    if {"weights", "covariance"} & set(config.eval_metrics):
        trace = WeightTrace(
            config.num_chains, config.num_draws, objective.anchor, config.max_memory_bytes or TRACE_BYTES
        )
    fluctuation = None
    if "singular-fluctuation" in config.eval_metrics:
        if sample_objective is None and isinstance(objective, TransformerObjective):
            sample_objective = SequenceLosses(objective)
        if sample_objective is None:
            raise ValueError("the metric 'singular-fluctuation' needs sample_objective, with one loss per sample")
        first = _indexed(config, source, eval_batches)(0)
        fluctuation = SingularFluctuation(sample_objective, first, config.num_chains)
    plan = Plan(
        config,
        objective,
        source,
        AnchorLosses(objective, anchors),
        evaluation,
        pair=config.num_init_loss_batches is None,
        recorders=(*recorders, *(recorder for recorder in (trace, fluctuation) if recorder is not None)),
    )
    tuned = None
    if config.step_size is None:
        tuned = tune(plan, seed)
        config = config.model_copy(
            update={"sampling_method": "langevin", "epsilon": tuned.epsilon, "gamma": tuned.gamma, "init_seed": seed}
        )
        plan = replace(plan, config=config)
    seeds = [seed + chain for chain in range(config.num_chains)]
    run = run_chains(plan, seeds * len(objectives), progress)
    if config.num_init_loss_batches is not None:
        init = _mean_init_losses(objective, anchors, source, eval_batches, config)
        run = replace(run, anchor_losses=init.repeat_interleave(len(seeds), 0)[:, None].expand_as(run.losses))
    for start in range(0, len(run.losses), len(seeds)):
        part = run.of_chains(slice(start, start + len(seeds)))
        yield summarise_chains(
            config,
            part,
            part.anchor_losses,
            seed=seed,
            reference_loss=reference_loss,
            noise_heating=noise_heating(config, plan, part.positions[part.healthy]),
            tuned=tuned,
            weights=trace,
            singular_fluctuation=None if fluctuation is None else fluctuation.estimate(config.inverse_temperature),
        )


def _as_source(batches: BatchSource | Iterable[Batch], independent: bool) -> BatchSource:
    """A callable as it is; an iterable, held as a list and cycled (from a place given by the chain's seed, if independent)."""
    if callable(batches):
        return batches
    held = list(batches)
    if not held:
        raise ValueError("batches is empty; give at least one batch")
    if independent:
        return lambda step, seed: held[(step + seed) % len(held)]
    return lambda step: held[step % len(held)]


def _evaluation(
    config: SamplerConfig, source: BatchSource, eval_batches: BatchSource | Sequence[Batch] | None
) -> Evaluation | None:
    """Where the draws' losses are taken, after `eval_method`."""
    at = _indexed(config, source, eval_batches)
    match config.eval_method:
        case "grad-minibatch":
            return None
        case "fixed-minibatch":
            first = [at(0)]
            return Evaluation(lambda draw: first, constant=True)
        case "new-minibatch":
            # Batches beyond those of the gradient are new to it.
            offset = config.num_steps if eval_batches is None else 0
            return Evaluation(lambda draw: [at(offset + draw)], constant=False)
        case "dataset":
            if eval_batches is None or callable(eval_batches):
                raise ValueError(
                    "eval_method='dataset' needs eval_batches as a sequence that holds the whole evaluation set"
                )
            everything = list(eval_batches)
            return Evaluation(lambda draw: everything, constant=True)


def _indexed(
    config: SamplerConfig, source: BatchSource, eval_batches: BatchSource | Sequence[Batch] | None
) -> Callable[[int], Batch]:
    """Index -> evaluation batch."""
    if eval_batches is None:
        return (lambda index: source(index, config.init_seed or 0)) if config.independent_batches else source
    if callable(eval_batches):
        return eval_batches
    return lambda index: eval_batches[index % len(eval_batches)]


def _mean_init_losses(
    objective: Objective,
    anchors: Tensor,
    source: BatchSource,
    eval_batches: BatchSource | Sequence[Batch] | None,
    config: SamplerConfig,
) -> Tensor:
    """Mean losses (C, T) of every w* over the configured number of batches."""
    at = _indexed(config, source, eval_batches)
    assert config.num_init_loss_batches is not None
    total = sum(objective.losses(anchors, at(i)).cpu().double() for i in range(config.num_init_loss_batches))
    assert isinstance(total, Tensor)
    return total / config.num_init_loss_batches
