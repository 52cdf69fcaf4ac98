"""The weights of each kind of run (the kinds are in `icl.config.kinds`)."""

import math
from collections.abc import Mapping

from torch import Tensor

from icl.config import Training
from icl.config.language import LanguageTask, LanguageTraining
from icl.config.training import TaskConfig
from icl.model import flatten, initial_parameters, parameter_layout
from icl.subjects import language
from icl.subjects.language import LanguageShape

Sizes = Mapping[str, tuple[int, ...]]


def sizes_of(config: Training) -> Sizes:
    """Name -> shape of every weight, in the order of the flat vector."""
    if isinstance(config, LanguageTraining):
        return language.parameter_sizes(language_shape(config.task_config))
    assert isinstance(config.task_config, TaskConfig)
    return {name: size for name, (_, size) in parameter_layout(config.task_config.shape).items()}


def initial_weights(config: Training) -> dict[str, Tensor]:
    """The initial weights of a run. Seeds must be resolved."""
    seed = config.task_config.seed
    assert seed is not None, "seeds are resolved before use"
    if isinstance(config, LanguageTraining):
        return language.initial_parameters(language_shape(config.task_config), seed)
    assert isinstance(config.task_config, TaskConfig)
    return initial_parameters(config.task_config.shape, seed)


def language_shape(task: LanguageTask) -> LanguageShape:
    """The sizes of a language model."""
    return LanguageShape(task.n_layers, task.d_model, task.n_heads, task.d_head, task.n_ctx, task.d_vocab)


def initial_flat(config: Training, state: Mapping[str, Tensor]) -> Tensor:
    """The parameters (P,) of a saved state, or the initial ones if `state` is empty."""
    return state["flat"] if state else flatten(initial_weights(config))


def num_parameters(sizes: Sizes) -> int:
    """P, the length of the flat vector."""
    return sum(math.prod(size) for size in sizes.values())


def named(sizes: Sizes, flat: Tensor) -> dict[str, Tensor]:
    """Named views of a flat vector (P,)."""
    parts = flat.split([math.prod(size) for size in sizes.values()])
    return {name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}
