"""The W&B side of a run: its tracker, and the configuration that `wandb agent` hands over.

Whatever W&B does, the run goes on: a server that does not answer costs at most a few seconds at the start and at the
end, one line says so, and what could not be sent lies in W&B's own offline format for `wandb sync`. The client is
imported on first use.
"""

import atexit
import netrc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from icl.tracking.trackers import (
    Status,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from icl.tracking.trackers import Images

Notify = Callable[[str], None]

PROJECT = "icl"
RUN_ID = "wandb-run-id"  # the file beside the metrics of a run that W&B, or its offline record, has
INTERRUPTED_TIMEOUT = 4.0
# The seconds that an unreachable server may cost at the start and at the end. W&B's own WANDB_INIT_TIMEOUT and
# WANDB_FINISH_TIMEOUT override them.
TIMEOUTS = {"init_timeout": 15.0, "finish_timeout": 30.0}


def say(line: str) -> None:
    """One line to the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


class WandbTracker:
    """A run on W&B, or in W&B's offline format where the server cannot be reached.

    Metrics are logged against the training step. A continued run skips the steps that the server already has: data are
    a function of the step, so they would be the same numbers.
    """

    rows = 0

    def __init__(
        self,
        name: str | None,
        config: Mapping[str, Any],
        *,
        project: str | None = None,
        entity: str | None = None,
        run_id: str | None = None,
        offline: bool = False,
        notify: Notify = say,
    ) -> None:
        """Start the run, or continue the one with this id; a run of an agent takes id and project from the agent."""
        self._notify = notify
        self._run: Any = None
        self._first_step = 0
        self._told = False
        arguments = {"name": name, "config": dict(config), "project": project, "entity": entity, "id": run_id}
        reason = "" if offline else self._start(resume="allow", **arguments)
        if self._run is None:
            failure = self._start(mode="offline", **arguments)
            hint = (
                f"Not even its offline record works ({failure}); only the local files are kept."
                if failure
                else (f"The run goes on and is recorded; send it later: {self.sync_command}")
            )
            notify(f"W&B does not answer ({reason}). {hint}" if reason else hint)
        else:
            notify(f"W&B: {self._run.url}")

    @property
    def run_id(self) -> str | None:
        """W&B's id of the run."""
        return None if self._run is None else self._run.id

    @property
    def sync_command(self) -> str:
        """What sends the record of this run later; of a run that began online `wandb sync` wants to be told so."""
        option = "" if self._run.offline else "--no-skip-online "
        return f"wandb sync {option}{self._run.settings.sync_dir}"

    def log(self, step: int, metrics: Mapping[str, float | str], images: "Images | None" = None) -> None:
        """Hand the metrics, and pictures beside them, to the client, which sends them from a process of its own."""
        with self._shielded() as run:
            if run is not None and step >= self._first_step:
                run.log({**metrics, **{name: _picture(image) for name, image in (images or {}).items()}}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set headline numbers."""
        with self._shielded() as run:
            if run is not None:
                run.summary.update(dict(values))

    def finish(self, status: Status = "finished", reason: str = "") -> None:
        """Wait a bounded time for the client to send the rest, then leave the rest to `wandb sync`.

        An interrupted run is announced as preempted, so that its sweep hands it out again, and waits for less.
        """
        with self._shielded() as run:
            if run is not None and status == "interrupted":
                run.mark_preempting()
                # The client's own limit is fixed when a run starts, and whoever presses Ctrl-C waits for less.
                finishing = threading.Thread(target=_finish_quietly, args=(run,), daemon=True)
                finishing.start()
                finishing.join(INTERRUPTED_TIMEOUT)
                if finishing.is_alive():
                    # At the interpreter's end the client would wait for its server once more.
                    atexit.register(_leave_at_once)
                    raise TimeoutError("no answer")
            elif run is not None:
                if reason:
                    run.summary["error"] = reason
                run.finish(exit_code=0 if status == "finished" else 1)

    def _start(self, **arguments: Any) -> str:
        """Start the client's run; what went wrong in a few words, or nothing."""
        try:
            import wandb

            wandb.setup(settings=wandb.Settings(silent=True))
            timeouts: dict[str, Any] = {
                key: value for key, value in TIMEOUTS.items() if f"WANDB_{key.upper()}" not in os.environ
            }
            settings = wandb.Settings(silent=True, console="off", finish_timeout_raises=True, **timeouts)
            self._run = wandb.init(settings=settings, **arguments)
            self._first_step = self._run.starting_step
            if self._run.summary.get("error") is not None:  # of an attempt before this one
                del self._run.summary["error"]
        except Exception as error:  # the client raises errors of its own, of requests and of the operating system
            return _first_line(error)
        return ""

    @contextmanager
    def _shielded(self) -> Iterator[Any]:
        """The client's run, or None; the first of the client's errors is told in one line, none reaches the run."""
        try:
            yield self._run
        except Exception as error:
            if not self._told:
                self._told = True
                self._notify(
                    f"W&B has not taken everything ({_first_line(error)}). Nothing is lost; "
                    f"send it later: {self.sync_command}"
                )


def wandb_is_set_up(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user means W&B: an agent, offline mode, a key in the environment or in ~/.netrc for its server."""
    if environ.get("WANDB_SWEEP_ID") or environ.get("WANDB_API_KEY") or is_offline(environ):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        path = Path(environ.get("NETRC") or Path.home() / ".netrc")
        return netrc.netrc(path).authenticators(host) is not None
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        netrc.NetrcParseError,
    ):  # no home, no such file, not one of keys
        return False


def _leave_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _picture(image: "Path | Figure") -> Any:
    """A figure as pixels: the client's own conversion fails where matplotlib.pyplot was never imported."""
    import wandb
    from PIL import Image

    if isinstance(image, Path):
        return wandb.Image(str(image))
    buffer = BytesIO()
    image.savefig(buffer)
    buffer.seek(0)
    return wandb.Image(Image.open(buffer))


def _finish_quietly(run: Any) -> None:
    with suppress(Exception):
        run.finish(exit_code=1)


def is_offline(environ: Mapping[str, str]) -> bool:
    return environ.get("WANDB_MODE") in ("offline", "dryrun")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
