"""The settings that vary between the runs of a sweep, under their dotted names."""

from collections.abc import Mapping, Sequence
from typing import Any

from icl.config.settings import dotted

UNSET = None
"""The value of a setting in a run that does not have it."""


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted names of the settings that have more than one value, in order of first appearance.

    Args:
        configs: plain nested data, such as `Settings.model_dump(mode="json")`. `run_name` does not count as a setting.
    """
    flat = [dotted(config) for config in configs]
    names = dict.fromkeys(name for each in flat for name in each)
    return [
        name
        for name in names
        if name != "run_name" and any(each.get(name, UNSET) != flat[0].get(name, UNSET) for each in flat)
    ]
