"""Where a run's metrics go: to local files, to W&B, to both, or nowhere.

The local files are the record. They are complete whatever happens to the network, and a run that was killed and
continued leaves the same bytes as one that never stopped. W&B holds a copy for people to look at; only
`icl.tracking.wandb` uses its client.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from icl.storage import StorageError
from icl.storage.files import explain, read_file, write_atomically
from icl.storage.jsonl import JsonLines, has_step, parse_object, read_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Images = Mapping[str, Path | Figure]

Status = Literal["finished", "failed", "interrupted"]

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
IMAGES = "images"
VERDICT = ("status", "error", "remark")  # how the last attempt ended; dropped when the run continues

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where metrics go. Every method returns at once, and never raises because of a network or a disk.

    Attributes:
        rows: number of rows in the local record, including those that wait for the disk; 0 without a local record.
    """

    @property
    def rows(self) -> int: ...

    def log(self, step: int, metrics: Mapping[str, float | str], images: "Images | None" = None) -> None:
        """Record the metrics of one training step, and pictures by name; steps must not decrease."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the run's headline numbers; a name given again is replaced."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Tell people at once that something went wrong. Only W&B can do that."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table beside the metrics. Only W&B does; the files hold what it is made of."""
        ...

    def finish(self, status: Status = "finished", reason: str = "") -> None:
        """Close the record; nothing may be logged afterwards. The reason of a failure becomes the summary's `error`."""
        ...


class Unseen:
    """The part of a tracker that only W&B has."""

    def alert(self, title: str, text: str) -> None:
        """Do nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Do nothing."""


class NullTracker(Unseen):
    """Records nothing."""

    rows = 0

    def log(self, step: int, metrics: Mapping[str, float | str], images: "Images | None" = None) -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, status: Status = "finished", reason: str = "") -> None:
        """Do nothing."""


class LocalTracker(Unseen):
    """Files in one folder: `metrics.jsonl` (one JSON object per row, see `read_metrics`), `summary.json`, `images/`.

    No file holds a time or a host, so equal runs leave equal bytes. If the disk is full, rows wait in memory and are
    written with the next row; a warning says so.
    """

    def __init__(self, directory: str | Path, next_step: int = 0) -> None:
        """Open the record of a run whose next step is `next_step`.

        Rows of this step and later ones are dropped, because the run will log them again. Damaged lines are moved to
        another file, see `JsonLines`.

        Raises:
            StorageError: the folder cannot be written.
        """
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / METRICS
        try:
            self._rows = JsonLines(path, sound=has_step, keep=lambda row: row["step"] < next_step)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {explain(error)}") from error
        kept_summary = read_summary(self.directory) if next_step > 0 else {}
        self._summary = {name: value for name, value in kept_summary.items() if name not in VERDICT}

    @property
    def rows(self) -> int:
        """Number of rows of `metrics.jsonl`, including those that wait for the disk."""
        return self._rows.count

    def log(self, step: int, metrics: Mapping[str, float | str], images: "Images | None" = None) -> None:
        """Append one row and flush it to the disk, so that a checkpoint written later is never ahead of the metrics.

        Images are written before the row, to `images/<name>-<step>.png`, where slashes in the name become dashes. So the
        images of every row exist.
        """
        for name, image in (images or {}).items():
            self._write(self.directory / IMAGES / f"{name.replace('/', '-')}-{step}.png", _png(image))
        try:
            self._rows.append({"step": step, **{name: _number(value) for name, value in metrics.items()}})
        except OSError as error:
            if self._rows.waiting == 1:
                path, reason = self._rows.path, explain(error)
                _log.warning("cannot write %s: %s. Its rows wait in memory until it can be written", path, reason)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Rewrite `summary.json` with these values added."""
        self._summary.update({name: _number(value) for name, value in values.items()})
        self._write_summary("running")

    def finish(self, status: Status = "finished", reason: str = "") -> None:
        """Write the status, and the reason as `error`, into `summary.json`."""
        try:
            self._rows.flush()
        except OSError:
            _log.warning("%d rows could not be written to %s and are lost", self._rows.waiting, self._rows.path)
        self._write_summary(status, reason)

    def _write_summary(self, status: str, reason: str = "") -> None:
        verdict = {"status": status, "error": reason} if reason else {"status": status}
        text = json.dumps({**self._summary, **verdict}, indent=2, sort_keys=True) + "\n"
        self._write(self.directory / SUMMARY, text.encode())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            _log.warning("cannot write %s: %s", path, explain(error))


class TeeTracker:
    """Sends everything to several trackers, in order."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    @property
    def rows(self) -> int:
        """Number of rows of the tracker that keeps a local record."""
        return max(tracker.rows for tracker in self.trackers)

    def log(self, step: int, metrics: Mapping[str, float | str], images: "Images | None" = None) -> None:
        """Pass the row to every tracker."""
        for tracker in self.trackers:
            tracker.log(step, metrics, images)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Pass the values to every tracker."""
        for tracker in self.trackers:
            tracker.summary(values)

    def alert(self, title: str, text: str) -> None:
        """Pass the alert to every tracker."""
        for tracker in self.trackers:
            tracker.alert(title, text)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Pass the table to every tracker."""
        for tracker in self.trackers:
            tracker.table(name, columns, rows)

    def finish(self, status: Status = "finished", reason: str = "") -> None:
        """Close every tracker."""
        for tracker in self.trackers:
            tracker.finish(status, reason)


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, exactly as logged. Damaged lines are left out.

    `pandas.DataFrame(read_metrics(directory))` makes a table. `pandas.read_json(path, lines=True)` reads the file too,
    but rounds the last digit of some numbers unless `precise_float=True`.
    """
    path = Path(directory) / METRICS
    try:
        return read_json_lines(path, has_step)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {explain(error)}") from error


def read_summary(directory: str | Path) -> dict[str, Any]:
    """The contents of `summary.json`, including `status`; empty if the file is missing or damaged."""
    path = Path(directory) / SUMMARY
    try:
        values = parse_object(read_file(path)) if path.exists() else {}
    except OSError as error:
        raise StorageError(f"cannot read {path}: {explain(error)}") from error
    if values is None:
        _log.warning("%s is damaged and left out", path)
    return values or {}


def _png(image: "Path | Figure") -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    drawn = BytesIO()
    # matplotlib would write its version into the file; without that, equal figures give equal bytes.
    image.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()


def _number(value: Any) -> Any:
    """A plain Python number for a NumPy or torch scalar; any other value as it is."""
    return value.item() if hasattr(value, "item") else value


@contextmanager
def failures_recorded(tracker: Tracker, alarming: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """If the `with` block fails, close the record with the reason, and raise the error again.

    Args:
        alarming: errors that people are told at once.
    """
    try:
        yield
    except KeyboardInterrupt:
        tracker.finish("interrupted")
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, alarming):
            tracker.alert("The run diverged", reason)
        tracker.finish("failed", reason)
        raise
