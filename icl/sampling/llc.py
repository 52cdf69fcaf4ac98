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
from dataclasses import dataclass, replace

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
from icl.sampling.result import LLCResult
from icl.sampling.transformer_objective import SequenceLosses, TransformerObjective, make_objective
from icl.sampling.tuning import tune

logger = logging.getLogger(__name__)

TRACE_BYTES = 2**31
"""What a kept weight trace may take where nobody said: the same everywhere, for it decides which draws are kept."""


@dataclass(frozen=True)
class Inputs:
    """What an estimate is made from, besides the model and the sampler's settings; see `estimate_llc`."""

    batches: BatchSource | Iterable[Batch]
    eval_batches: BatchSource | Sequence[Batch] | None = None
    reference_loss: float | None = None
    sample_objective: Losses | None = None
    recorders: Sequence[Recorder] = ()
    progress: Progress | None = None


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
        loss_fn: (predict, batch) -> a scalar, or one loss per token (T,) whose mean is the loss; `predict(*inputs)` runs
            the module at the chain's weights. With `icl.evals.mse_loss` and the library's own transformer the fast path
            runs.
        batches: step -> batch, or (step, chain seed) -> batch with `independent_batches`; or an iterable, which is
            cycled.
        config: see `SamplerConfig`; the default finds its own step size.
        eval_batches: what `eval_method` other than "grad-minibatch" evaluates on, as a sequence or as index -> batch;
            "dataset" needs a sequence. None: batches that the gradient has not seen ("new-minibatch"), else `batches`
            themselves.
        reference_loss: a loss that no useful model exceeds, such as that of predicting zero. Chains above it have left
            the basin, the region around w* that the estimate is about.
        sample_objective: one loss per sample (`ModuleObjective` of a loss function that returns a vector), for the
            metric "singular-fluctuation", which is taken on the first evaluation batch. None: for the library's
            transformer, that of a sequence.
        recorders: called with (draw, weights (E, P), chain indices) at every draw (`icl.sampling.observables`).
        progress: called with (steps done, steps in all).

    L(w*) is taken on the very batches of the draws, so that λ̂ is a mean of paired differences and the noise of the
    batches cancels. With `num_init_loss_batches` it is taken on that many batches instead.

    Raises:
        ValueError: see `ModuleObjective` and `SamplerConfig`; a loss at w* that is not finite.
    """
    inputs = Inputs(batches, eval_batches, reference_loss, sample_objective, recorders, progress)
    return estimate_llc_of(make_objective(model, loss_fn, config), inputs, config)


def estimate_llc_of(objective: Objective, inputs: Inputs, config: SamplerConfig = AUTOMATIC) -> LLCResult:
    """`estimate_llc` for an objective that is already made."""
    return next(_estimate([objective], inputs, config))


def estimate_llcs(
    models: Sequence[InContextRegressionTransformer], loss_fn: LossFunction, inputs: Inputs, config: SamplerConfig
) -> Iterator[LLCResult]:
    """`estimate_llc` of several transformers of one shape under `icl.evals.mse_loss`, all their chains in one batch.

    Each sees the data and the noise of its own estimate, so that results agree to the rounding of batched arithmetic.
    It pays on accelerators; `can_share_a_batch` says for which settings it is possible.

    Raises:
        ValueError: models, a loss or settings that cannot share a batch; or see `estimate_llc`, for the model whose turn
            it is.
    """
    objectives = [make_objective(model, loss_fn, config) for model in models]
    alike = len({model.shape for model in models}) == 1 and all(
        isinstance(each, TransformerObjective) for each in objectives
    )
    if not alike or not can_share_a_batch(config):
        raise ValueError("these models or settings cannot share a batch; use estimate_llc on one model after the other")
    return _estimate(objectives, inputs, config)


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


def _estimate(objectives: Sequence[Objective], inputs: Inputs, config: SamplerConfig) -> Iterator[LLCResult]:
    """One estimate for every objective. They differ in w* alone; what is recorded besides losses is that of a single one."""
    if config.num_burn_in is not None:
        logger.info(
            "num_burn_in=%d is ignored, as in the published runs; num_burnin_steps is the burn-in", config.num_burn_in
        )
    objective, anchors = objectives[0], torch.stack([each.anchor for each in objectives])
    seed = secrets.randbelow(2**31) if config.init_seed is None else config.init_seed
    source = _as_source(inputs.batches, config.independent_batches)
    evaluated = _evaluation_batches(config, source, inputs.eval_batches)
    trace, fluctuation = _weight_trace(config, objective), _fluctuation(config, objective, inputs, evaluated)
    plan = Plan(
        config,
        objective,
        source,
        AnchorLosses(objective, anchors),
        _evaluation(config, evaluated, inputs.eval_batches),
        pair=config.num_init_loss_batches is None,
        recorders=(*inputs.recorders, *(recorder for recorder in (trace, fluctuation) if recorder is not None)),
    )
    tuned = None
    if config.step_size is None:
        tuned = tune(plan, seed)
        config = config.model_copy(
            update={"sampling_method": "langevin", "epsilon": tuned.epsilon, "gamma": tuned.gamma, "init_seed": seed}
        )
        plan = replace(plan, config=config)
    seeds = [seed + chain for chain in range(config.num_chains)]
    run = run_chains(plan, seeds * len(objectives), inputs.progress)
    if config.num_init_loss_batches is not None:
        init = _mean_init_losses(objective, anchors, evaluated, config.num_init_loss_batches)
        run = replace(run, anchor_losses=init.repeat_interleave(len(seeds), 0)[:, None].expand_as(run.losses))
    for start in range(0, len(run.losses), len(seeds)):
        part = run.of_chains(slice(start, start + len(seeds)))
        if not bool(torch.isfinite(part.anchor_losses).all()):
            raise ValueError("the loss of w* is not finite; the weights given are no minimum of anything")
        yield LLCResult(
            part,
            config,
            seed,
            noise_heating=noise_heating(config, plan, part.positions[part.healthy]),
            reference_loss=inputs.reference_loss,
            tuned=tuned,
            weights=trace,
            singular_fluctuation=None if fluctuation is None else fluctuation.estimate(config.inverse_temperature),
        )


def _weight_trace(config: SamplerConfig, objective: Objective) -> WeightTrace | None:
    if not {"weights", "covariance"} & set(config.eval_metrics):
        return None
    return WeightTrace(config.num_chains, config.num_draws, objective.anchor, config.max_memory_bytes or TRACE_BYTES)


def _fluctuation(
    config: SamplerConfig, objective: Objective, inputs: Inputs, evaluated: Callable[[int], Batch]
) -> SingularFluctuation | None:
    if "singular-fluctuation" not in config.eval_metrics:
        return None
    of_samples = inputs.sample_objective
    if of_samples is None and isinstance(objective, TransformerObjective):
        of_samples = SequenceLosses(objective)
    if of_samples is None:
        raise ValueError("the metric 'singular-fluctuation' needs sample_objective, with one loss per sample")
    return SingularFluctuation(of_samples, evaluated(0), config.num_chains)


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
    config: SamplerConfig, evaluated: Callable[[int], Batch], eval_batches: BatchSource | Sequence[Batch] | None
) -> Evaluation | None:
    """Where the draws' losses are taken, after `eval_method`."""
    match config.eval_method:
        case "grad-minibatch":
            return None
        case "fixed-minibatch":
            first = [evaluated(0)]
            return Evaluation(lambda draw: first, constant=True)
        case "new-minibatch":
            # Batches beyond those of the gradient are new to it.
            offset = config.num_steps if eval_batches is None else 0
            return Evaluation(lambda draw: [evaluated(offset + draw)], constant=False)
        case "dataset":
            if eval_batches is None or callable(eval_batches):
                raise ValueError(
                    "eval_method='dataset' needs eval_batches as a sequence that holds the whole evaluation set"
                )
            everything = list(eval_batches)
            return Evaluation(lambda draw: everything, constant=True)


def _evaluation_batches(
    config: SamplerConfig, source: BatchSource, eval_batches: BatchSource | Sequence[Batch] | None
) -> Callable[[int], Batch]:
    """Index -> evaluation batch."""
    if eval_batches is None:
        return (lambda index: source(index, config.init_seed or 0)) if config.independent_batches else source
    if callable(eval_batches):
        return eval_batches
    return lambda index: eval_batches[index % len(eval_batches)]


def _mean_init_losses(objective: Objective, anchors: Tensor, evaluated: Callable[[int], Batch], count: int) -> Tensor:
    """Mean losses (C, T) of every w* over the first `count` evaluation batches."""
    total = sum(objective.losses(anchors, evaluated(i)).cpu().double() for i in range(count))
    assert isinstance(total, Tensor)
    return total / count
