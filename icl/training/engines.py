"""Which engines a run was trained by.

Every engine computes the same numbers up to rounding, so a run that changes its engine goes on, but not to the bytes of one
that kept it. Its states say which engine did which steps, and the change is told.
"""

import logging

from icl.checkpoints import Checkpoints

ENGINES = "engines"
"""Of the metadata of a state: pairs of a first step and the engine that did the steps from there on."""

_log = logging.getLogger(__name__)


def engines_with(engine: str, step: int, checkpoints: Checkpoints) -> list[list[int | str]]:
    """The engines of a run that goes on at `step` with this one."""
    stored = checkpoints.read_state(step).metadata.get(ENGINES) if step else None
    if not isinstance(stored, list) or not stored or not isinstance(stored[-1], list):
        return [[step, engine]]  # a new run, or one of a version that did not keep this
    last = stored[-1][-1]
    if last == engine:
        return stored
    _log.warning(
        "%s goes on at step %d with the engine %s; the steps before were done by %s. Its numbers will differ in their last "
        "digits from those of a run that kept its engine (icl doctor says which one is in force here, and why)",
        checkpoints.run_name, step, engine, last,
    )  # fmt: skip
    return [*stored, [step, engine]]
