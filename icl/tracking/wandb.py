"""The tracker that sends a run to W&B.

A failure of W&B never stops a run. A server that does not answer costs at most some seconds at the start and at the end,
and one line says so. What could not be sent is kept in W&B's own offline format for `wandb sync`. The client is imported
on first use.
"""

import atexit
import netrc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
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
RUN_ID = "wandb-run-id"  # file beside the metrics that holds the run's W&B id
INTERRUPTED_TIMEOUT = 4.0
# The seconds that an unreachable server may cost at the start and at the end. W&B's own WANDB_INIT_TIMEOUT and
# WANDB_FINISH_TIMEOUT override them.
TIMEOUTS = {"init_timeout": 15.0, "finish_timeout": 30.0}


def say(line: str) -> None:
    """Print one line to standard error."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Labels:
    """How W&B shows a run among others: its group, its tags and its job type; and whether people get alerts."""

    group: str | None = None
    tags: tuple[str, ...] = ()
    job_type: str | None = None
    alerts: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """The labels that are set, as the client takes them. What is not set is left to the client's own variables."""
        given = {"group": self.group, "tags": self.tags, "job_type": self.job_type}
        return {name: value for name, value in given.items() if value}


class WandbTracker:
    """A run on W&B, or in W&B's offline format if the server cannot be reached.

    Metrics are logged against the training step. A continued run skips the steps that the server already has. Data are
    a function of the step, so the numbers would be the same.
    """

    rows = 0

    def __init__(
        self,
        name: str | None,
        config: Mapping[str, Any],
        *,
        project: str | None = None,
        entity: str | None = None,
        labels: Labels = Labels(),
        run_id: str | None = None,
        offline: bool = False,
        notify: Notify = say,
    ) -> None:
        """Start a run, or continue the one with id `run_id`. Under an agent, id and project come from the agent."""
        self._notify = notify
        self._run: Any = None
        self._first_step = 0
        self._told = False
        self._last_step = 0
        self._alerts = labels.alerts
        arguments = {"name": name, "config": dict(config), "project": project, "entity": entity, "id": run_id}
        arguments |= labels.arguments
        reason = "" if offline else self._start(resume="allow", **arguments)
        if self._run is None:
            failure = self._start(mode="offline", **arguments)
            hint = (
                f"Its offline record does not work either ({failure}); only the local files are kept."
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
        """The command that sends this run's record later. For a run that began online, `wandb sync` needs an option."""
        option = "" if self._run.offline else "--no-skip-online "
        return f"wandb sync {option}{self._run.settings.sync_dir}"

    def log(self, step: int, metrics: Mapping[str, float | str], images: "Images | None" = None) -> None:
        """Give the metrics and images to the client, which sends them from its own process."""
        with self._shielded() as run:
            self._last_step = step
            if run is not None and step >= self._first_step:
                run.log({**metrics, **{name: _picture(image) for name, image in (images or {}).items()}}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set summary values."""
        with self._shielded() as run:
            if run is not None:
                run.summary.update(dict(values))

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell the run's owner, by mail or as they have chosen there."""
        with self._shielded() as run:
            if run is not None and self._alerts:
                run.alert(title, text, level="ERROR")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in the run's workspace.

        It is sent as HTML. The client makes an artifact of its own kind of table, and asks the server about it while the run waits.
        """
        with self._shielded() as run:
            if run is not None:
                import wandb

                # A part of the newest row, which is not sent yet.
                run.log({name: wandb.Html(_html_table(columns, rows), inject=False)}, step=self._last_step)

    def finish(self, status: Status = "finished", reason: str = "") -> None:
        """Wait a bounded time for the client to send what is left. What it does not send is left to `wandb sync`.

        An interrupted run is marked as preempted, so that its sweep gives it to an agent again. It waits less.
        """
        with self._shielded() as run:
            if run is not None and status == "interrupted":
                run.mark_preempting()
                # The client's own time limit is fixed when the run starts, and is too long after Ctrl-C.
                finishing = threading.Thread(target=_finish_quietly, args=(run,), daemon=True)
                finishing.start()
                finishing.join(INTERRUPTED_TIMEOUT)
                if finishing.is_alive():
                    # Otherwise the client would wait for its server again when the interpreter exits.
                    atexit.register(_leave_at_once)
                    raise TimeoutError("no answer")
            elif run is not None:
                if reason:
                    run.summary["error"] = reason
                run.finish(exit_code=0 if status == "finished" else 1)

    def _start(self, **arguments: Any) -> str:
        """Start the client's run. Returns what went wrong in a few words, or an empty text."""
        try:
            import wandb

            wandb.setup(settings=wandb.Settings(silent=True))
            timeouts: dict[str, Any] = {
                key: value for key, value in TIMEOUTS.items() if f"WANDB_{key.upper()}" not in os.environ
            }
            settings = wandb.Settings(silent=True, console="off", finish_timeout_raises=True, **timeouts)
            self._run = wandb.init(settings=settings, **arguments)
            self._first_step = self._run.starting_step
            if self._run.summary.get("error") is not None:  # from an earlier attempt
                del self._run.summary["error"]
        except Exception as error:  # the client raises errors of its own, of requests and of the operating system
            return _first_line(error)
        return ""

    @contextmanager
    def _shielded(self) -> Iterator[Any]:
        """Give the client's run, or None, to the block. The client's errors are caught; the first one is reported."""
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
    """Whether W&B is set up: an agent, offline mode, or a key in the environment or in ~/.netrc for its server."""
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
    ):  # no home folder, no such file, or a file of another form
        return False


def _leave_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _picture(image: "Path | Figure") -> Any:
    """A figure as pixels. The client's own conversion fails if matplotlib.pyplot was never imported."""
    import wandb
    from PIL import Image

    if isinstance(image, Path):
        return wandb.Image(str(image))
    buffer = BytesIO()
    image.savefig(buffer)
    buffer.seek(0)
    return wandb.Image(Image.open(buffer))


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        shown = ["" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells]
        return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in shown) + "</tr>"

    return f"<table>{line(columns, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _finish_quietly(run: Any) -> None:
    with suppress(Exception):
        run.finish(exit_code=1)


def is_offline(environ: Mapping[str, str]) -> bool:
    return environ.get("WANDB_MODE") in ("offline", "dryrun")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
