"""The runs of a sweep, told apart by their names."""

from collections.abc import Sequence

from icl.config import ConfigError, Training
from icl.estimation import LLCConfig

RunConfig = Training | LLCConfig


def training_of(config: RunConfig) -> Training:
    """The settings of the training run that a run does or looks at."""
    return config.training if isinstance(config, LLCConfig) else config


def by_name(configs: Sequence[RunConfig]) -> dict[str, int]:
    """Name of a run -> index of its first point in the sweep; a run that several points describe appears once.

    A run without a name and without a seed draws a seed, which gives it a name of its own.

    Raises:
        ConfigError: points that are not the same run share a name.
    """
    places: dict[str, int] = {}
    for place, config in enumerate(configs):
        training = training_of(config)
        if training.task_config.seed is None and training.run_name is None:
            places[f"{config.name}-{place}"] = place
            continue
        first = configs[places.setdefault(config.name, place)]
        if difference := config.difference(first.model_dump(mode="json")):
            raise ConfigError(
                f"two runs of this sweep are called {config.name}, and one has {difference}; leave run_name out: then each "
                "is named by its settings"
            )
    return places
