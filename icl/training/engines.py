"""The record of which engine trained which steps of a run.

All engines compute the same numbers up to rounding. So a run may continue with another engine, but its bytes then differ
from those of a run that kept its engine. The states record which engine did which steps, and a change is logged.
"""

import logging

from icl.checkpoints import Checkpoints

ENGINES = "engines"
"""Key of a state's metadata. Its value is a list of pairs: a first step, and the engine that did the steps from there on."""

_log = logging.getLogger(__name__)


def engines_with(engine: str, step: int, checkpoints: Checkpoints) -> list[list[int | str]]:
    """The record of a run that continues at `step` with `engine`. A change of engine is logged."""
    stored = checkpoints.read_state(step).metadata.get(ENGINES) if step else None
    if not isinstance(stored, list) or not stored or not isinstance(stored[-1], list):
        return [[step, engine]]  # a new run, or one from a version without this record
    last = stored[-1][-1]
    if last == engine:
        return stored
    _log.warning(
        "%s continues at step %d with the engine %s; the steps before were done by %s. Its numbers will differ in their last "
        "digits from those of a run that kept its engine (icl doctor says which one is used on this machine, and why)",
        checkpoints.run_name, step, engine, last,
    )  # fmt: skip
    return [*stored, [step, engine]]
