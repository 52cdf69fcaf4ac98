"""The interface of a subject: four methods, which a user's own class has too."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from icl.sampling import Inputs, SamplerConfig
from icl.sampling.objective import Batch
from icl.sampling.supply import BatchSource, on_device, supply_of


class Subject(Protocol):
    """A model along its checkpoints, its loss, and its data.

    A class may have more, which is used where it is there:

    - `eval_batches(step)`: what the losses of draws are taken on with an `eval_method` other than "grad-minibatch";
    - `reference_loss`: a number that no useful model's loss exceeds;
    - `sampling_inputs(step, sampler, device)`: in place of these and of `batches`, where the data depend on the sampler's settings;
    - `reads_ahead = True`: every call of `model` gives a module of its own, so that the next one may be read during an estimate;
    - `Settings`: a pydantic model that the settings are checked by before anything runs (`icl.subjects.named`).
    """

    def steps(self) -> Sequence[int]:
        """The checkpoints there are."""
        ...

    def model(self, step: int) -> nn.Module:
        """The module at w*, the weights of a checkpoint."""
        ...

    def loss(self, predict: Callable[..., Any], batch: Batch, /) -> Tensor:
        """A scalar, or one loss per token (T,); `predict(*inputs)` runs the module at the chain's weights."""
        ...

    def batches(self, step: int) -> BatchSource | Iterable[Batch]:
        """The data at a checkpoint: sampling step -> batch, or an iterable (`icl.sampling.estimate_llc`)."""
        ...


def inputs_of(subject: Subject, step: int, sampler: SamplerConfig, device: torch.device | str = "cpu") -> Inputs:
    """The data of an estimate at a checkpoint; the sampler's seed is given."""
    own = getattr(subject, "sampling_inputs", None)
    if own is not None:
        return own(step, sampler, device)
    evaluation = getattr(subject, "eval_batches", None)
    return Inputs(
        subject.batches(step),
        None if evaluation is None else evaluation(step),
        getattr(subject, "reference_loss", None),
    )


def batches_in_order(
    subject: Subject, step: int, sampler: SamplerConfig, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The batches at a checkpoint, on a device: all of one pass over data that have an end, those of the steps 0, 1, ... otherwise."""
    seed = sampler.init_seed or 0
    sampler = sampler.model_copy(update={"init_seed": seed})
    batches = inputs_of(subject, step, sampler, device).batches
    supply = on_device(supply_of(batches, sampler.independent_batches, seed), torch.device(device))
    if supply.everything is not None:
        yield from (supply.everything[index] for index in range(len(supply.everything)))
        return
    for index in itertools.count():
        yield supply.source(index, seed) if sampler.independent_batches else supply.source(index)


def first_batch(subject: Subject, step: int, sampler: SamplerConfig, device: torch.device | str = "cpu") -> Batch:
    """The first batch of the data at a checkpoint."""
    seed = sampler.init_seed or 0
    sampler = sampler.model_copy(update={"init_seed": seed})
    supply = supply_of(inputs_of(subject, step, sampler, device).batches, sampler.independent_batches, seed)
    return supply.source(0, seed) if sampler.independent_batches else supply.source(0)
