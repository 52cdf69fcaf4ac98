"""A proxy before an S3 server that spoils requests on the wire, and counts what it did."""

import base64
import contextlib
import http.client
import itertools
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "reset before the request",
    "reset amid the request",
    "reset after the request",
    "reset amid the answer",
    "truncated answer",
    "wrong checksum",
    "500",
    "503",
    "stall",
)
_ERRORS = {"500": ("InternalError", 500), "503": ("SlowDown", 503)}


def at_random(faults: Iterable[str], rate: float, seed: int) -> Iterator[str | None]:
    """A fault for about `rate` of the requests, each kind equally often."""
    kinds, draw = list(faults), random.Random(seed)
    return (draw.choice(kinds) if draw.random() < rate else None for _ in itertools.count())


class FaultProxy:
    """Forwards HTTP to `target`; request i meets `schedule`'s i-th fault, or none where that is None or has ended.

    Attributes:
        injected: how often each fault was met. A wrong checksum is met by data alone, sent or answered.
        requests: how many requests came, by method.
    """

    def __init__(
        self, target: tuple[str, int], schedule: Iterable[str | None] = (), stall_s: float = 1.0, port: int = 0
    ) -> None:
        self.target = target
        self.schedule = iter(schedule)
        self.stall_s = stall_s
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # broken connections are the point
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_fault(self, method: str) -> str | None:
        with self._lock:
            self.requests[method] += 1
            return next(self.schedule, None)

    def met(self, fault: str | None) -> None:
        with self._lock:
            if fault is not None:
                self.injected[fault] += 1


def _spoilt(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def _as_stated(body: bytes, headers: Message) -> bool:
    """What S3 checks and moto does not: the body against the checksum that came with it, if one did."""
    stated = headers.get("x-amz-checksum-crc32")
    return stated is None or base64.b64decode(stated) == zlib.crc32(body).to_bytes(4, "big")


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    timeout = 30

    def _serve(self) -> None:
        fault = self.owner.next_fault(self.command)
        if fault != "wrong checksum":
            self.owner.met(fault)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "reset before the request":
            return self._reset()
        if fault == "reset amid the request":
            self.rfile.read(length // 2)
            return self._reset()
        body = self.rfile.read(length)
        if fault == "stall":
            time.sleep(self.owner.stall_s)
            return self._reset()
        if fault in _ERRORS:
            return self._refuse(*_ERRORS[fault])
        if fault == "wrong checksum" and body:
            self.owner.met(fault)
            body = _spoilt(body)
            if not _as_stated(body, self.headers):
                return self._refuse("BadDigest", 400)
        status, headers, answer = self._forward(body)
        if fault == "reset after the request":
            return self._reset()
        if fault == "wrong checksum" and answer and self.command == "GET":
            self.owner.met(fault)
            answer = _spoilt(answer)
        half = fault in ("reset amid the answer", "truncated answer")
        self._answer(status, headers, answer[: len(answer) // 2] if half else answer)
        if fault == "reset amid the answer":
            return self._reset()
        self.close_connection = self.close_connection or half
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.owner.target, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            answer, kept = response.read(), response.getheaders()
            if response.chunked:  # comes without a length, and goes on whole
                kept.append(("Content-Length", str(len(answer))))
            return response.status, kept, answer
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Headers as the server gave them, its Content-Length included, whatever is left of the body."""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _refuse(self, code: str, status: int) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    def _reset(self) -> None:
        # Closing with a linger time of zero sends RST, where an ordinary close would send FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass
