"""Messages for people. Work does not end because a message cannot be written: the reader is gone, or the disk is full."""

import io
import sys
from typing import Any, TextIO


class Forgiving(io.TextIOBase):
    """A text stream that drops what cannot be written, from a stream that may be gone.

    Args:
        stream: to write to; None, as of a program without a terminal, drops everything.
        forgives: the errors that are dropped; others are kept for `failure`.
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
        """Whether a terminal shows it."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's own; raises `OSError` where it has none."""
        return io.TextIOBase.fileno(self) if self._stream is None else self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's own."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """The stream's own."""
        return getattr(self._stream, "errors", None) or "strict"

    @property
    def buffer(self) -> Any:
        """The stream's own."""
        return self._stream.buffer if self._stream is not None else io.BytesIO()


def forgive_output() -> Forgiving:
    """Let messages, and results that a closed pipe does not want, be dropped from here on.

    Returns:
        The stream of results: what it could not write for another reason is its `failure`.
    """
    sys.stderr = Forgiving(sys.stderr)
    sys.stdout = results = Forgiving(sys.stdout, BrokenPipeError)
    return results
