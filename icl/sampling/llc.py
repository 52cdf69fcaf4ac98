r"""The local learning coefficient and related quantities, with their uncertainty and health.

With draws w_t from p(w) ∝ exp(−nβ L(w) − (γ/2)‖w − w*‖²),

    λ̂ = nβ ( E[L(w_t)] − L(w*) )        (Lau et al. 2023, arXiv 2308.12108, eq. 3.5)
    WBIC = n E[L(w_t)]                   (Watanabe 2013)
    ν̂ = nβ V / 2,   V = mean_i Var_t ℓ_i(w_t)    (singular fluctuation; Watanabe 2009, with ℓ_i the loss of sample i)

Shapes: E chains, N draws, T losses of one batch (tokens; 1 for a scalar loss).
"""

import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from icl.model import InContextRegressionTransformer
from icl.sampling.budget import SoFar, check_resumable, draws_at_most, sampled, with_found, without_losses
from icl.sampling.chains import ChainRun, Paused, Progress
from icl.sampling.checks import Heating, cost_of_w_star, langevin_constants, noise_heating
from icl.sampling.config import SamplerConfig
from icl.sampling.control import AnchorGradients, MeanGradient, mean_gradient, most_batches
from icl.sampling.evaluated import Evaluated, evaluated_of, evaluation_of, init_errors, refuse_unused
from icl.sampling.init_losses import init_losses
from icl.sampling.langevin import friction_of
from icl.sampling.look import look_at, worth_of_w_star
from icl.sampling.loss_trace import LossTrace, Observables
from icl.sampling.needs import Effort, longest_step
from icl.sampling.noise import chain_seeds
from icl.sampling.objective import Batch, Losses, LossFunction, ModuleObjective, Objective
from icl.sampling.observables import SingularFluctuation, WeightTrace
from icl.sampling.plan import AnchorLosses, Plan, Recorder, TestSchedule
from icl.sampling.presets import AUTOMATIC
from icl.sampling.restriction import Masks
from icl.sampling.result import LLCResult
from icl.sampling.stein import stride_for
from icl.sampling.supply import (
    BatchSource,
    Supply,
    num_samples,
    on_device,
    samples_needed,
    supply_of,
    two_batches,
)
from icl.sampling.transformer_objective import SequenceLosses, TransformerObjective, make_objective
from icl.sampling.tuning import Tuned, tune
from icl.sampling.units import InUnits, in_weights

logger = logging.getLogger(__name__)

COST_BATCHES = 32

TRACE_BYTES = 2**31
"""Bytes that a kept weight trace may take by default. It decides which draws are kept, so it is the same on every machine."""


@dataclass(frozen=True)
class Inputs:
    """All inputs of an estimate other than the model and the sampler's settings; see `estimate_llc`."""

    batches: BatchSource | Iterable[Batch]
    eval_batches: BatchSource | Sequence[Batch] | None = None
    reference_loss: float | None = None
    sample_objective: Losses | None = None
    recorders: Sequence[Recorder] = ()
    progress: Progress | None = None
    so_far: SoFar | None = None
    resume: LLCResult | None = None
    observed: Mapping[str, LossTrace] = field(default_factory=dict)


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
    so_far: SoFar | None = None,
    resume: LLCResult | None = None,
    observables: Observables | None = None,
    mask: Masks | None = None,
) -> LLCResult:
    """Estimate the local learning coefficient of a model at its present weights w*. The model is not changed.

    Args:
        model: any `nn.Module`, at w*.
        loss_fn: (predict, batch) -> a scalar, or one loss per token (T,) whose mean is the loss. `predict(*inputs)` runs the module at
            the chain's weights. `icl.evals.mse_loss` with the library's own transformer uses the fast path.
        batches: step -> batch, or (step, chain seed) -> batch with `independent_batches`; or an iterable, which is cycled.
        config: see `SamplerConfig`. The default finds its own step size.
        eval_batches: evaluation data for an `eval_method` other than "grad-minibatch", as a sequence or as index -> batch. "dataset"
            needs a sequence. None: `batches`; for "new-minibatch" those that the gradient has not seen.
        reference_loss: a loss that no useful model exceeds, such as that of predicting zero. Chains above it have left the basin, the
            region around w* to which the estimate refers.
        sample_objective: gives one loss per sample (`ModuleObjective` of a loss function that returns a vector) for the metric
            "singular-fluctuation", on the first evaluation batch. None: for the library's transformer, the loss of each sequence.
        recorders: called with (draw, weights (E, P), chain indices) at every draw (`icl.sampling.observables`).
        progress: called with (steps done, steps in all).
        so_far: called about ten times with (λ̂, its standard error) from the draws so far.
        resume: an estimate to continue: the result of the same call with a smaller `max_draws`. The new result equals, bit for bit, one
            that had the larger `max_draws` from the beginning.
        observables: name -> (batches, per_sample_loss). The losses of this data are kept at every draw, one per sample (S,) or one per
            sample and token (S, T). The result has them as `observables[name]`, for `icl.sampling.influence` and
            `icl.sampling.susceptibility`.
        mask: parameter name -> boolean mask of the coordinates that move. Parameters without a mask stay at w*. The mask applies
            together with `include` and `exclude` of the config, which name parameters, parts of them and attention heads
            (`icl.sampling.restriction`). None: everything that these name moves.

    L(w*) is taken on the batches of the draws. So λ̂ is a mean of paired differences, in which the noise of the batches cancels. With
    `num_init_loss_batches`, it is taken on that many batches instead.

    Raises:
        ValueError: see `ModuleObjective`, `SamplerConfig` and `LossTrace`; or the loss at w* is not finite; or settings, weights or
            batches differ from those of the estimate to resume.
    """
    refuse_unused(eval_batches, config)
    for remark in config.without_effect():
        logger.warning("%s", remark)
    observed = {
        name: LossTrace(
            name,
            data,
            lambda loss: ModuleObjective(model, loss, config.include, config.exclude, mask=mask),
            loss,
            config.num_chains,
            draws_at_most(config),
            _held_bytes(config),
        )
        for name, (data, loss) in (observables or {}).items()
    }
    inputs = Inputs(
        batches, eval_batches, reference_loss, sample_objective, recorders, progress, so_far, resume, observed
    )
    return estimate_llc_of(make_objective(model, loss_fn, config, mask), inputs, config)


def estimate_llc_of(objective: Objective, inputs: Inputs, config: SamplerConfig = AUTOMATIC) -> LLCResult:
    """`estimate_llc` for an existing objective."""
    return next(_estimate([objective], inputs, config))


def estimate_llcs(
    models: Sequence[InContextRegressionTransformer], loss_fn: LossFunction, inputs: Inputs, config: SamplerConfig
) -> Iterator[LLCResult]:
    """`estimate_llc` for several transformers of one shape with `icl.evals.mse_loss`, with all chains in one batch.

    Each model sees the data and the noise of its own estimate. So the results agree with single estimates to the rounding of batched
    arithmetic. This is faster on accelerators. `can_share_a_batch` says for which settings it is possible.

    Raises:
        ValueError: models, loss or settings cannot share a batch; or see `estimate_llc`, when the result of a model is taken.
    """
    objectives = [make_objective(model, loss_fn, config) for model in models]
    alike = len({model.shape for model in models}) == 1 and all(
        isinstance(each, TransformerObjective) for each in objectives
    )
    if not alike or not can_share_a_batch(config):
        raise ValueError("these models or settings cannot share a batch; use estimate_llc on one model after the other")
    return _estimate(objectives, inputs, config)


def can_share_a_batch(config: SamplerConfig) -> bool:
    """Whether chains of several models may run as one batch.

    They may if all weights are sampled, the constants are given, the data are shared, and only losses are recorded.
    """
    everything = tuple(config.include) == ("**",) and not config.exclude and config.localization_units == "absolute"
    metrics = {"likelihood-derived", "batch-loss", "hessian"}
    return (
        everything
        and config.step_size is not None
        and not config.independent_batches
        and metrics >= {*config.eval_metrics}
    )


def _estimate(objectives: Sequence[Objective], inputs: Inputs, config: SamplerConfig) -> Iterator[LLCResult]:
    """One estimate for every objective. The objectives differ only in w*. Records other than losses need a single objective."""
    if config.num_burn_in is not None:
        logger.info(
            "num_burn_in=%d is ignored, as in the published runs; num_burnin_steps is the burn-in", config.num_burn_in
        )
    if inputs.resume is not None:
        config = config.model_copy(update={"init_seed": inputs.resume.seed})
    ready = _prepared(objectives, inputs, config)
    plan, seed, config, tuned, run, paused = _chains_of(ready, inputs, len(objectives))
    seeds = chain_seeds(seed, config.num_chains, config.noise_law)
    held = _cost_batches(ready)
    for place, start in enumerate(range(0, len(run.losses), len(seeds))):
        part = run.of_chains(slice(start, start + len(seeds)))
        if place > 0:  # only now, so that a model that cannot be sampled does not stop the estimates before it
            look_at(objectives[place], ready.first)
        if not bool(torch.isfinite(part.anchor_losses).all()):
            raise ValueError("the loss of w* is not finite; give weights of a trained model")
        own = replace(
            plan,
            objective=objectives[place],
            anchor_losses=AnchorLosses(objectives[place]),
            anchor_gradients=plan.anchor_gradients
            and AnchorGradients(objectives[place], objectives[place].anchor[None]),
            mean=_of_anchor(plan, place),
        )
        cost, twin = cost_of_w_star(own, part, held)
        heating = noise_heating(config, own, part.positions[part.healthy])
        yield LLCResult(
            part,
            config,
            seed,
            noise_heating=heating.controlled if plan.control else heating.plain,
            effort=_effort(ready, own, part, heating, tuned),
            reference_loss=_reference_loss(objectives[place], part, inputs, held),
            init_error=plan.init_error(part.losses.shape[1], place),
            cost=cost,
            twin=twin,
            unknown_gradient=_unknown_gradient(own, ready.supply),
            tuned=tuned,
            paused=paused.of_chains(slice(start, start + len(seeds))),
            weights=ready.trace,
            singular_fluctuation=ready.singular_fluctuation(config.inverse_temperature),
            observed=inputs.observed,
        )


def _reference_loss(objective: Objective, run: ChainRun, inputs: Inputs, held: Sequence[Batch]) -> float | None:
    """The one given, or L(w*) plus how much worse uninformed weights are. In this difference the noise of the batches cancels."""
    if inputs.reference_loss is not None:
        return inputs.reference_loss
    worth = worth_of_w_star(objective, held)
    return None if worth is None else float(run.anchor_losses.double().mean()) + worth


def _chains_of(
    ready: "_Ready", inputs: Inputs, models: int
) -> tuple[Plan, int, SamplerConfig, Tuned | None, ChainRun, Paused]:
    """The chains, with the step size and localisation that are given, that the pilot finds, or that the resumed estimate has."""
    plan, seed, before = ready.plan, ready.seed, inputs.resume
    tuned, found = None, plan.config.step_size is None
    if found:
        tuned = tune(plan, seed) if before is None else before.tuned
        if tuned is None:
            raise ValueError("resume: the estimate to continue had a given step size; give the same epsilon")
        plan = replace(plan, config=with_found(plan.config, tuned, seed), control=tuned.control)
    seeds = chain_seeds(seed, plan.config.num_chains, plan.config.noise_law) * models
    if before is not None:
        if found:  # the earlier estimate may have shortened the pilot's step size
            plan = replace(plan, config=plan.config.model_copy(update={"epsilon": before.config.epsilon}))
        check_resumable(before, plan, seeds)
        run, paused = sampled(plan, seeds, inputs.progress, inputs.so_far, before)
    elif found:
        plan, run, paused = without_losses(plan, seeds, inputs.progress, inputs.so_far, ready.trace is None)
    else:
        so_far = inputs.so_far if models == 1 else None
        run, paused = sampled(plan, seeds, inputs.progress, so_far, may_go_on=ready.trace is None)
    return plan, seed, plan.config, tuned, run, paused


def _effort(ready: "_Ready", plan: Plan, run: ChainRun, heating: Heating, tuned: Tuned | None) -> Effort | None:
    """What the estimate spent; None for kernels without a formula for the heating by batches."""
    config = plan.config
    if config.method not in ("sgld", "langevin") or config.step_size is None:
        return None
    friction = friction_of(langevin_constants(config)) if config.method == "langevin" else None
    sizes = ready.supply.sizes
    return Effort(
        steps=config.num_burnin_steps + run.losses.shape[1] * config.num_steps_bw_draws,
        epsilon=config.step_size,
        friction=friction,
        nbeta=config.inverse_temperature,
        batch=None if plan.constant else num_samples(ready.first),
        samples=sum(sizes) if sizes else None,
        control=plan.control,
        found=tuned is not None,
        longest=math.nan if tuned is None else longest_step(tuned.curvature, config.localization + config.weight_decay),
        plain=heating.plain,
        controlled=heating.controlled,
    )


@dataclass(frozen=True)
class _Ready:
    """Everything that is prepared before sampling."""

    plan: Plan
    seed: int
    supply: Supply
    evaluated: Evaluated
    first: Batch
    trace: WeightTrace | None
    fluctuation: SingularFluctuation | None

    def singular_fluctuation(self, nbeta: float) -> float | None:
        return None if self.fluctuation is None else self.fluctuation.estimate(nbeta)


def _prepared(objectives: Sequence[Objective], inputs: Inputs, config: SamplerConfig) -> _Ready:
    """Check the inputs and plan the chains."""
    objective, anchors = objectives[0], torch.stack([each.anchor for each in objectives])
    seed = secrets.randbelow(2**31) if config.init_seed is None else config.init_seed
    device = objective.anchor.device
    supply = supply_of(inputs.batches, config.independent_batches, seed, config.shuffled, config.grad_batch_size)
    supply = on_device(supply, device)
    config = with_samples(config, supply).model_copy(update={"init_seed": seed})
    source = supply.source
    evaluated = evaluated_of(config, supply, inputs.eval_batches, seed, device)
    count, init = config.num_init_loss_batches, None
    if count is not None:
        init = init_losses(objective, anchors, evaluated.batch, count, evaluated.per_pass, evaluated.weight)
    first, second = two_batches(supply, config.independent_batches, seed)
    look_at(objective, first, second)
    trace, fluctuation = _weight_trace(config, objective), _fluctuation(config, objective, inputs, evaluated)
    plan = Plan(
        config,
        objective,
        source,
        AnchorLosses(objective, anchors),
        evaluation_of(config, evaluated),
        init_losses=None if init is None else init.mean,
        init_errors=None if init is None else partial(init_errors, config, supply, evaluated, init),
        recorders=_of_weights(
            objective,
            (
                *inputs.recorders,
                *inputs.observed.values(),
                *(recorder for recorder in (trace, fluctuation) if recorder is not None),
            ),
        ),
        constant=supply.constant,
        cycle=supply.cycle,
        stride=supply.stride,
    )
    plan = _with_gradients_of_w_star(plan, supply, seed)
    return _Ready(plan, seed, supply, evaluated, first, trace, fluctuation)


def localisation_of(objective: Objective, inputs: Inputs, config: SamplerConfig) -> float:
    """The γ that pilot chains find at one model (`icl.sampling.tuning`), for a run that uses one γ at all its checkpoints."""
    ready = _prepared([objective], inputs, config)
    return tune(ready.plan, ready.seed).gamma


def with_samples(config: SamplerConfig, supply: Supply) -> SamplerConfig:
    """The settings with n taken from the data, unless the user has given n.

    Raises:
        ValueError: nβ depends on n, which is known neither from the data nor from the user.
    """
    if "eval_dataset_size" in config.model_fields_set:
        return config
    if supply.num_samples is None:
        if config.nbeta is not None or config.gradient_scale is not None:
            return config
        raise ValueError(
            "nbeta = n / log n needs n, the number of training samples, which is not known from these batches; give eval_dataset_size=n "
            "or nbeta in the SamplerConfig, or pass a sized DataLoader, or a list of batches whose tensors all begin with the samples"
        )
    return SamplerConfig.parse({**config.model_dump(exclude_unset=True), "eval_dataset_size": supply.num_samples})


def _with_gradients_of_w_star(plan: Plan, supply: Supply, seed: int) -> Plan:
    """The plan with ḡ and the tests of the target, if either is wanted."""
    config = plan.config
    tested = config.test_target and config.eval_loss_fn == "mse"
    wanted = tested or config.step_size is None or config.control_variates == "on"
    if not wanted:
        return plan
    at_anchor = AnchorGradients(plan.objective, plan.anchors)
    batch = (lambda index: plan.batches(index, seed)) if config.independent_batches else plan.batches
    samples = samples_needed(config.inverse_temperature)
    most = most_batches(config.num_chains, config.num_steps)
    mean = mean_gradient(at_anchor, supply.everything, batch, config.num_steps, samples, most)
    schedule = TestSchedule(stride_for(config.num_chains, plan.constant), seed) if tested else None
    control = config.control_variates == "on" and not plan.constant
    return replace(plan, anchor_gradients=at_anchor, mean=mean, tests=schedule, control=control)


def _unknown_gradient(plan: Plan, supply: Supply) -> float:
    """See `LLCResult.unknown_gradient`."""
    known = plan.mean.samples if plan.control and plan.mean is not None else None
    if known is None:
        return 0.0
    # A pass that is shuffled meets no sample twice, so what it has met of the data is known.
    missing = 1 / known - (1 / supply.num_samples if supply.stride > 1 and supply.num_samples else 0.0)
    return plan.config.inverse_temperature * max(missing, 0.0)


def _of_anchor(plan: Plan, place: int) -> MeanGradient | None:
    """ḡ of one of several w*."""
    mean = plan.mean
    if mean is None:
        return None
    own = slice(place, place + 1)
    return replace(mean, whole=mean.whole[own], halves=(mean.halves[0][own], mean.halves[1][own]))


def _cost_batches(ready: _Ready) -> Sequence[Batch]:
    """The batches on which the loss at the chains' mean is compared with that of w*."""
    everything = ready.supply.everything
    if everything is not None and len(everything) <= COST_BATCHES:
        return everything
    return [ready.evaluated.batch(index) for index in range(COST_BATCHES)]


def _of_weights(objective: Objective, recorders: Sequence[Recorder]) -> tuple[Recorder, ...]:
    """Recorders that get weights, also if the chains move in other units."""
    return tuple(map(objective.of_weights, recorders)) if isinstance(objective, InUnits) else tuple(recorders)


def _weight_trace(config: SamplerConfig, objective: Objective) -> WeightTrace | None:
    if not {"weights", "covariance"} & set(config.eval_metrics):
        return None
    return WeightTrace(config.num_chains, config.num_draws, in_weights(objective).anchor, _held_bytes(config))


def _held_bytes(config: SamplerConfig) -> int:
    """The bytes that one kept trace may take."""
    return config.max_memory_bytes or TRACE_BYTES


def _fluctuation(
    config: SamplerConfig, objective: Objective, inputs: Inputs, evaluated: Evaluated
) -> SingularFluctuation | None:
    if "singular-fluctuation" not in config.eval_metrics:
        return None
    of_samples = inputs.sample_objective
    plain = in_weights(objective)
    if of_samples is None and isinstance(plain, TransformerObjective):
        of_samples = SequenceLosses(plain)
    if of_samples is None:
        raise ValueError("the metric 'singular-fluctuation' needs sample_objective, with one loss per sample")
    return SingularFluctuation(of_samples, evaluated.first, config.num_chains)
