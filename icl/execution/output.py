"""Output streams that do not end the work if nobody reads them or the disk is full."""

import io
import sys
from typing import Any, TextIO


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
