"""One estimate at a checkpoint, or at several whose chains share a batch."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from icl.engine import mse_loss
from icl.estimation.batches import sampling_batches
from icl.estimation.config import LLCConfig
from icl.model import InContextRegressionTransformer
from icl.sampling import LLCResult, can_share_a_batch, estimate_llcs
from icl.sampling.chains import chains_that_fit
from icl.sampling.config import SamplerConfig
from icl.sampling.llc import Inputs, estimate_llc_of, localisation_of
from icl.sampling.transformer_objective import make_objective
from icl.streams import Stream
from icl.tasks import zero_predictor_loss

AT_ONCE = 16
"""Most checkpoints whose chains share a batch: what a run that is stopped loses."""


def model_at(
    config: LLCConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> InContextRegressionTransformer:
    """The run's model with the given weights."""
    return InContextRegressionTransformer.from_weights(config.training.task_config.shape, weights).to(device)


def estimate_at_checkpoint(
    config: LLCConfig,
    weights: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LLCResult:
    """One estimate at the given weights, with data and chains made from `sampler_config.init_seed` (drawn if null)."""
    return next(estimate_at_checkpoints(config, [weights], device, progress))


def estimate_at_checkpoints(
    config: LLCConfig,
    weights: Sequence[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LLCResult]:
    """`estimate_at_checkpoint` at each of several checkpoints; the chains of more than one run as one batch.

    Raises:
        ValueError: settings that do not allow that (`icl.sampling.can_share_a_batch`).
    """
    sampler, inputs = _asked(config, device, progress)
    models = [model_at(config, each, device) for each in weights]
    if len(models) == 1:
        yield estimate_llc_of(make_objective(models[0], mse_loss, sampler), inputs, sampler)
    else:
        yield from estimate_llcs(models, mse_loss, inputs, sampler)


def with_one_localisation(
    config: LLCConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> LLCConfig:
    """The same with the localisation γ that the pilot chains find at the given weights, where none is given and they look for it.

    Estimates along a run compare only at one γ.
    """
    if not finds_localisation(config):
        return config
    sampler, inputs = _asked(config, device, None)
    objective = make_objective(model_at(config, weights, device), mse_loss, sampler)
    return with_localisation(config, localisation_of(objective, inputs, sampler))


def finds_localisation(config: LLCConfig) -> bool:
    """Whether γ is left to the pilot chains."""
    return config.sampler_config.step_size is None and config.sampler_config.gamma is None


def with_localisation(config: LLCConfig, gamma: float) -> LLCConfig:
    """The same with this γ."""
    return config.model_copy(update={"sampler_config": config.sampler_config.model_copy(update={"gamma": gamma})})


def _asked(
    config: LLCConfig, device: torch.device | str, progress: Callable[[int, int], None] | None
) -> tuple[SamplerConfig, Inputs]:
    """The sampler's settings with seed and n given, and the data of an estimate."""
    task = config.training.task_config.resolved().pretrain_task()
    sampler = config.sampler_config
    seed = secrets.randbelow(2**31) if sampler.init_seed is None else sampler.init_seed
    told = {"init_seed": seed, "eval_metrics": config.metrics, "eval_dataset_size": sampler.eval_dataset_size}
    sampler = sampler.model_copy(update=told)
    batches, eval_batches = sampling_batches(task, sampler, seed, device)
    return sampler, Inputs(batches, eval_batches, zero_predictor_loss(task), progress=progress)


def hessian_at_checkpoint(
    config: LLCConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """`hessian/evals/i` for the `num_evals` largest eigenvalues of the loss Hessian, and `hessian/trace`, on fixed
    data.

    The loss is that of the first `eval_batch_size` (default `grad_batch_size`) sequences of the evaluation set.
    """
    from icl.analysis.hessian import hessian_table

    sampler = config.sampler_config
    task = config.training.task_config.resolved().pretrain_task()
    size = sampler.eval_batch_size or sampler.grad_batch_size
    xs, ys = task.sample(Stream(sampler.init_seed or 0, "sampling").child("dataset"), 0, size, device)
    table = hessian_table(model_at(config, weights, device), xs, ys, sampler.num_evals)
    return {str(name): float(table[name].iloc[0]) for name in table.columns}


def checkpoints_at_once(config: LLCConfig, device: torch.device | str) -> int:
    """How many checkpoints' chains run as one batch.

    On an accelerator a launch for many costs little more than for one: as many as fit its memory, but at most AT_ONCE. On a CPU one,
    because the chains of a single checkpoint fill the caches. Also one if each checkpoint draws a seed of its own.
    """
    sampler = config.sampler_config.model_copy(update={"eval_metrics": config.metrics})
    if torch.device(device).type == "cpu" or sampler.init_seed is None or not can_share_a_batch(sampler):
        return 1
    task = config.training.task_config.resolved().pretrain_task()
    batch = task.sample(Stream(0, "sampling"), 0, sampler.grad_batch_size, device)
    model = InContextRegressionTransformer.from_shape(config.training.task_config.shape, seed=0).to(device)
    fitting = chains_that_fit(sampler, make_objective(model, mse_loss, sampler), batch)
    return min(AT_ONCE, max(1, fitting // sampler.num_chains))
