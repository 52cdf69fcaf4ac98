"""Choosing and opening the trackers of a run."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from icl.storage.files import read_file, write_atomically
from icl.tracking.trackers import (
    IMAGES,
    VERDICT,
    LocalTracker,
    NullTracker,
    TeeTracker,
    Tracker,
    read_metrics,
    read_summary,
)
from icl.tracking.wandb import PROJECT, RUN_ID, Labels, Notify, WandbTracker, is_offline, say, wandb_is_set_up

Wanted = Literal["auto", "wandb", "local", "none"]


def open_tracker(
    directory: str | Path,
    name: str,
    config: Mapping[str, Any],
    *,
    next_step: int = 0,
    wanted: Wanted = "auto",
    project: str | None = None,
    entity: str | None = None,
    labels: Labels = Labels(),
    environ: Mapping[str, str] = os.environ,
    notify: Notify = say,
) -> Tracker:
    """The tracker of one run: files in `directory`, and W&B too if it is wanted.

    Args:
        next_step: the step that the run does next. Rows of this step and later ones are dropped, see `LocalTracker`.
        wanted: "local" writes files. "wandb" writes files and records on W&B, offline if there is no key. "auto" is "wandb" if
            a key is found or an agent started the process, else "local". "none" records nothing. WANDB_MODE=disabled turns "wandb" and
            "auto" into "local".
        project, entity: from the sweep file. WANDB_PROJECT and WANDB_ENTITY, which an agent sets, take precedence.
        labels: group, tags and job type. WANDB_RUN_GROUP, WANDB_TAGS and WANDB_JOB_TYPE take precedence.
    """
    if wanted == "none":
        return NullTracker()
    local = LocalTracker(directory, next_step)
    disabled, set_up = environ.get("WANDB_MODE") == "disabled", wandb_is_set_up(environ)
    if wanted == "local" or disabled or (wanted == "auto" and not set_up):
        return local
    note = local.directory / RUN_ID
    run_id = _given_id(environ, note, notify) or (_noted(note) if next_step > 0 else None)
    wandb_tracker = WandbTracker(
        name,
        config,
        project=environ.get("WANDB_PROJECT") or project or PROJECT,
        entity=environ.get("WANDB_ENTITY") or entity,
        labels=_unless_given(labels, environ),
        run_id=run_id,
        offline=is_offline(environ) or not set_up,
        notify=notify,
    )
    if wandb_tracker.run_id is not None:
        with suppress(OSError):  # without this note, a later attempt becomes a new W&B run
            write_atomically(note, wandb_tracker.run_id.encode())
    # Send what the local files hold already, for runs that began elsewhere or offline. W&B skips what it has.
    replay(local.directory, wandb_tracker)
    return TeeTracker(local, wandb_tracker)


def _unless_given(labels: Labels, environ: Mapping[str, str]) -> Labels:
    """The labels without those that W&B's own variables give."""
    variables = {"group": "WANDB_RUN_GROUP", "tags": "WANDB_TAGS", "job_type": "WANDB_JOB_TYPE"}
    return replace(
        labels, **{name: () if name == "tags" else None for name, key in variables.items() if environ.get(key)}
    )


def _given_id(environ: Mapping[str, str], note: Path, notify: Notify) -> str | None:
    """WANDB_RUN_ID, or a new id if another run in this folder has that one, because W&B would merge the two."""
    given = environ.get("WANDB_RUN_ID")
    others = note.parent.parent.glob(f"*/{RUN_ID}") if given else ()
    taken = next((path.parent.name for path in others if path != note and _noted(path) == given), None)
    if taken is None:
        return given
    notify(f"WANDB_RUN_ID={given} belongs to the run {taken}: this run gets another id")
    return _noted(note) or secrets.token_hex(4)


def _noted(note: Path) -> str | None:
    """The id that an earlier attempt of this run had on W&B."""
    try:
        return read_file(note).decode().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def replay(directory: str | Path, tracker: Tracker) -> None:
    """Send a tracker everything that the files of a `LocalTracker` hold, except how the run ended."""
    folder = Path(directory)
    images: dict[int, dict[str, Path]] = {}
    for path in sorted((folder / IMAGES).glob("*-*.png")):
        name, _, step = path.stem.rpartition("-")
        if step.isdecimal():
            images.setdefault(int(step), {})[name] = path
    for row in sorted(read_metrics(folder), key=itemgetter("step")):
        step = row.pop("step")
        tracker.log(step, row, images.pop(step, None))
    tracker.summary({name: value for name, value in read_summary(folder).items() if name not in VERDICT})
