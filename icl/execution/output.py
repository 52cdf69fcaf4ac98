"""Output streams that do not end the work if nobody reads them or the disk is full, and the log of what a run prints."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from icl.storage.files import explain

OUTPUT = "output.log"
"""The file in a run's folder that holds what the run prints."""

_log = logging.getLogger(__name__)


class Forgiving(io.TextIOBase):
    """A text stream that writes to another stream and drops what that does not take.

    Args:
        stream: the stream to write to. None, as in a program without a terminal, drops everything.
        forgives: the errors that are ignored. Other errors are not raised either, but kept in `failure`.
    """

    def __init__(self, stream: TextIO | None, forgives: type[OSError] = OSError) -> None:
        self._stream, self._forgives = stream, forgives
        self.failure: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write what can be written."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        self._try("flush")

    def _try(self, method: str, *arguments: Any) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except UnicodeEncodeError:
            self._try(method, *(text.encode("ascii", "backslashreplace").decode() for text in arguments))
        except ValueError:  # it was closed
            self._stream = None
        except OSError as error:
            if not isinstance(error, self._forgives):
                self.failure = error

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor; raises `OSError` if it has none."""
        return io.TextIOBase.fileno(self) if self._stream is None else self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """The stream's way to treat encoding errors."""
        return getattr(self._stream, "errors", None) or "strict"

    @property
    def buffer(self) -> Any:
        """The stream's binary buffer."""
        return self._stream.buffer if self._stream is not None else io.BytesIO()


def forgive_output() -> Forgiving:
    """Replace sys.stderr and sys.stdout by streams that do not raise.

    Messages (stderr) are dropped on any error, results (stdout) only if the reader of a pipe is gone.

    Returns:
        The stream of results. Its `failure` is the error if results could not be written for another reason.
    """
    sys.stderr = Forgiving(sys.stderr)
    sys.stdout = results = Forgiving(sys.stdout, BrokenPipeError)
    return results


def opened_log(log: Path) -> int:
    """A descriptor that appends to the log. If the log cannot be opened, a warning, and a descriptor that drops all output."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        # Do not follow a link that another user put there, nor wait for a reader of a pipe.
        guards = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | guards, 0o666)
    except OSError as error:
        _log.warning("the run's output is not kept: cannot write %s: %s", log, explain(error))
        return os.open(os.devnull, os.O_WRONLY)


class _Copied(Forgiving):
    """A stream whose text also goes to a log."""

    def __init__(self, stream: TextIO, log: Forgiving) -> None:
        super().__init__(stream)
        self._copy = log

    def write(self, text: str, /) -> int:
        self._copy.write(text)
        return super().write(text)


@contextmanager
def copied_to(log: Path) -> Iterator[None]:
    """Append to a log, too, what this process prints in the block, and the error that ends it."""
    raw = os.fdopen(opened_log(log), "ab", buffering=0)
    # Unbuffered, so that a full disk is noticed where a line is written and not where the file is closed.
    with io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True) as file:
        kept, before = Forgiving(file), (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = (_Copied(stream, kept) for stream in before)
        try:
            yield
        except Exception as error:
            kept.write(f"icl: {error}\n")
            raise
        finally:
            sys.stdout, sys.stderr = before
