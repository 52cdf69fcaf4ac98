"""The runs of a sweep by name."""

from collections.abc import Sequence

from icl.config import ConfigError, Training
from icl.estimation import LLCConfig

RunConfig = Training | LLCConfig


def training_of(config: RunConfig) -> Training:
    """The settings of the training run: the run itself, or the one along which it estimates."""
    return config.training if isinstance(config, LLCConfig) else config


def by_name(configs: Sequence[RunConfig]) -> dict[str, int]:
    """Name of a run -> index of its first point in the sweep. A run that several points describe appears once.

    A run without name and seed draws a seed, so each such point is a run of its own.

    Raises:
        ConfigError: two different runs have the same name.
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
                f"two runs of this sweep are called {config.name}, and one has {difference}; remove run_name, and each run "
                "is named after its settings"
            )
    return places
