"""The estimate at one checkpoint, or at several checkpoints whose chains are run as one batch."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from icl.engine import mse_loss
from icl.estimation.config import LLCConfig
from icl.model import InContextRegressionTransformer
from icl.sampling import LLCResult, can_share_a_batch, estimate_llcs
from icl.sampling.chains import chains_that_fit
from icl.sampling.config import SamplerConfig
from icl.sampling.llc import estimate_llc_of, localisation_of
from icl.sampling.transformer_objective import make_objective
from icl.streams import Stream
from icl.subjects import Subject, inputs_of
from icl.subjects.regression import HeldWeights, RegressionRun
from icl.subjects.subject import first_batch

AT_ONCE = 16
"""The most checkpoints whose chains share a batch. A run that is stopped loses at most these."""


def estimate_at_checkpoint(
    config: LLCConfig,
    weights: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LLCResult:
    """The estimate of a regression run at the given weights. Data and chains depend on `sampler_config.init_seed`, drawn if null."""
    return next(estimate_at_checkpoints(config, [weights], device, progress))


def estimate_at_checkpoints(
    config: LLCConfig,
    weights: Sequence[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LLCResult]:
    """`estimate_at_checkpoint` at each of several weights. If there is more than one, all chains are run as one batch.

    Raises:
        ValueError: the settings do not allow one batch (`icl.sampling.can_share_a_batch`).
    """
    subject = RegressionRun(config.training, HeldWeights(weights), config.grad_tasks, config.eval_tasks)
    steps = subject.steps()
    return estimates_of(config, subject, steps, [subject.model(step) for step in steps], device, progress)


def estimates_of(
    config: LLCConfig,
    subject: Subject,
    steps: Sequence[int],
    models: Sequence[nn.Module],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    so_far: Callable[[float, float], None] | None = None,
) -> Iterator[LLCResult]:
    """One estimate at each of some checkpoints with the given models. If there is more than one, all chains are run as one batch.

    Raises:
        ValueError: models or settings do not allow one batch (`icl.sampling.can_share_a_batch`).
    """
    sampler = sampler_of(config)
    inputs = replace(inputs_of(subject, steps[0], sampler, device), progress=progress, so_far=so_far)
    models = [model.to(device) for model in models]
    if len(models) == 1:
        yield estimate_llc_of(make_objective(models[0], subject.loss, sampler), inputs, sampler)
    else:
        alike = [model for model in models if isinstance(model, InContextRegressionTransformer)]
        yield from estimate_llcs(alike, subject.loss, inputs, sampler)


def with_one_localisation(
    config: LLCConfig, subject: Subject, step: int, device: torch.device | str = "cpu"
) -> LLCConfig:
    """A copy of the settings with the localisation γ that pilot chains find at a checkpoint, unless γ is given.

    All estimates along a run use one γ, because estimates with different γ cannot be compared.
    """
    if not finds_localisation(config):
        return config
    sampler = sampler_of(config)
    objective = make_objective(subject.model(step).to(device), subject.loss, sampler)
    return with_localisation(config, localisation_of(objective, inputs_of(subject, step, sampler, device), sampler))


def finds_localisation(config: LLCConfig) -> bool:
    """Whether pilot chains choose γ."""
    return config.sampler_config.step_size is None and config.sampler_config.gamma is None


def with_localisation(config: LLCConfig, gamma: float) -> LLCConfig:
    """A copy of the settings with this γ."""
    return config.model_copy(update={"sampler_config": config.sampler_config.model_copy(update={"gamma": gamma})})


def sampler_of(config: LLCConfig) -> SamplerConfig:
    """The sampler's settings for one estimate, in which the seed is a number."""
    sampler = config.sampler_config
    seed = secrets.randbelow(2**31) if sampler.init_seed is None else sampler.init_seed
    update: dict[str, object] = {"init_seed": seed, "eval_metrics": config.metrics}
    if config.is_regression:  # n is a setting here; the data of another subject may have a length of their own
        update["eval_dataset_size"] = sampler.eval_dataset_size
    return sampler.model_copy(update=update)


def hessian_of(
    config: LLCConfig, subject: Subject, step: int, model: nn.Module, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """`hessian/evals/i` for the `num_evals` largest eigenvalues of the loss Hessian at a checkpoint, and `hessian/trace`, on fixed data.

    For a regression run, the data are the first `eval_batch_size` (default `grad_batch_size`) sequences of the evaluation set. For another
    subject, they are its first batch.
    """
    from icl.analysis.hessian import hessian_row, hessian_table, module_loss

    sampler = config.sampler_config
    model = model.to(device)
    if isinstance(model, InContextRegressionTransformer) and config.is_regression:
        task = config.training.task_config.resolved().pretrain_task()
        size = sampler.eval_batch_size or sampler.grad_batch_size
        xs, ys = task.sample(Stream(sampler.init_seed or 0, "sampling").child("dataset"), 0, size, device)
        table = hessian_table(model, xs, ys, sampler.num_evals)
        return {str(name): float(table[name].iloc[0]) for name in table.columns}
    return hessian_row(
        *module_loss(model, subject.loss, first_batch(subject, step, sampler, device)), k=sampler.num_evals
    )


def checkpoints_at_once(config: LLCConfig, device: torch.device | str) -> int:
    """At how many checkpoints the chains are run as one batch.

    On an accelerator a launch for many chains costs little more than for one, so it is as many as fit into its memory, but at most AT_ONCE.
    On a CPU it is one, because the chains of a single checkpoint fill the caches. It is also one if each checkpoint draws its own seed.
    """
    sampler = config.sampler_config.model_copy(update={"eval_metrics": config.metrics})
    if (
        not config.is_regression
        or torch.device(device).type == "cpu"
        or sampler.init_seed is None
        or not can_share_a_batch(sampler)
    ):
        return 1
    task = config.training.task_config.resolved().pretrain_task()
    batch = task.sample(Stream(0, "sampling"), 0, sampler.grad_batch_size, device)
    model = InContextRegressionTransformer.from_shape(config.training.task_config.shape, seed=0).to(device)
    fitting = chains_that_fit(sampler, make_objective(model, mse_loss, sampler), batch)
    return min(AT_ONCE, max(1, fitting // sampler.num_chains))
