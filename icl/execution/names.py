"""The runs of a sweep by name."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from icl.config import ConfigError, Training
from icl.config.sweeps import Config, select
from icl.config.varying import varying
from icl.estimation import LLCConfig

RunConfig = Training | LLCConfig
Point = TypeVar("Point", Training, LLCConfig, RunConfig)


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
        if first is not config and (difference := config.difference(first.model_dump(mode="json"))):
            raise ConfigError(
                f"two runs of this sweep are called {config.name}, and one has {difference}; remove run_name, and each run "
                "is named after its settings"
            )
    return places


def attempt(parse: Callable[[Config], Point], data: Config) -> Point | ConfigError:
    """The settings of a point, or what is wrong with it."""
    try:
        return parse(data)
    except ConfigError as error:
        return error


def distinct(points: Sequence[Point | ConfigError]) -> list[Point | ConfigError]:
    """The runs of a sweep in order, each once. Their places are the numbers of `--dry-run` and of `--index`.

    An invalid point keeps its place, so it does not change the numbers of the others.

    Raises:
        ConfigError: two different runs have the same name.
    """
    places = [place for place, point in enumerate(points) if not isinstance(point, ConfigError)]
    firsts = {places[index] for index in by_name([sound(points[place]) for place in places]).values()}
    return [point for place, point in enumerate(points) if place in firsts or isinstance(point, ConfigError)]


def numbered(runs: Sequence[Point | ConfigError], index: int) -> Point:
    """The run with this number, counted from 0 (`distinct`).

    Raises:
        ConfigError: there is no such run, or it is invalid.
    """
    return sound(select(runs, index))


def sound(point: Point | ConfigError) -> Point:
    """The point.

    Raises:
        ConfigError: it is invalid.
    """
    if isinstance(point, ConfigError):
        raise point
    return point


def said_of_merged(points: Sequence[Point | ConfigError], runs: Sequence[Point | ConfigError]) -> str:
    """One line on the points of a sweep that describe one run, or an empty text. `runs` are the distinct ones."""
    if len(runs) == len(points):
        return ""
    alike: dict[str, list[Config]] = {}
    for point in points:
        if not isinstance(point, ConfigError):
            alike.setdefault(point.name, []).append(point.model_dump(mode="json"))
    names = ", ".join(dict.fromkeys(name for group in alike.values() for name in varying(group)))
    why = f"points that differ only in {names} are" if names else "equal points are"
    return f"{len(points)} points describe {len(runs)} runs: {why} one run, which is done with the settings of its first point"
