"""A headless Chromium, steered through a pipe: the pages that it opens, what they ask for, and what a script in them finds.

The protocol is that of its developer tools: messages in JSON, each ended by a zero byte, on the file descriptors 3 and 4.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """The path of a browser, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. `requested` are the addresses that it asked for."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._rest, self._count = to_browser, from_browser, b"", 0
        self.requested: list[str] = []
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime"):
            self._call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Go there and wait until it is loaded."""
        self._call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def type(self, text: str) -> None:
        """As a reader types, where the cursor is."""
        self._call("Input.insertText", text=text)

    def wait_for(self, condition: str, seconds: float = 60) -> Any:
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(condition):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"never true: {condition}")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]
        raise AssertionError("the browser is gone")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" in self._rest:
                line, self._rest = self._rest.split(b"\0", 1)
                yield json.loads(line)
            if not select.select([self._from], [], [], 30)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._from, 2**20)
            if not part:
                return
            self._rest += part


@contextmanager
def page() -> Iterator[Page]:
    """A tab of a new browser, which ends with the block."""
    path = browser()
    assert path
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1])]  # away from 3 and 4
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'),
                *(path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, to_browser[0], from_browser[1]):
            os.close(end)
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            process.kill()
            process.wait()
            for end in (to_browser[1], from_browser[0]):
                with suppress(OSError):
                    os.close(end)
