"""Services that answer, but not as S3 does."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Request(BaseHTTPRequestHandler):
    """One request; `served` counts those that came, by method."""

    protocol_version = "HTTP/1.1"
    served: dict[str, int]

    def reply(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        """A whole answer; underscores in the names of headers stand for dashes."""
        self.send_response(status)
        # Kept open, a connection would outlive its client, which nobody closes.
        for name, value in {"Content_Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Endpoint:
    """`answer` is called with each request, after its body was read as `request.body`."""

    def __init__(self, answer: Callable[..., None]) -> None:
        served: dict[str, int] = {}

        class Handler(Request):
            def serve(self) -> None:
                self.served[self.command] = self.served.get(self.command, 0) + 1
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = serve

        Handler.served = self.served = served
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients go away: that is the point
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Endpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def page(status: int = 200, body: bytes = b"<html><body>Please log in</body></html>") -> Callable[[Request], None]:
    """A login page instead of every answer."""
    return lambda request: request.reply(body, status, Content_Type="text/html")


def trickle(head: bytes, drop: bytes = b"x", pause_s: float = 0.2) -> Callable[[Request], None]:
    """`head`, and then for ever a few bytes now and then: no single wait is long."""

    def answer(request: Request) -> None:
        request.wfile.write(head)
        for _ in range(3000):
            request.wfile.write(drop)
            request.wfile.flush()
            time.sleep(pause_s)

    return answer


def error(status: int, code: str, message: str = "no", more: str = "") -> Callable[[Request], None]:
    """An error as S3 words it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>".encode()
    return lambda request: request.reply(body, status, Content_Type="application/xml")
