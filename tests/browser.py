"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol: just what the tests need of it."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(is_true, *, timeout_s: float, what: str) -> Any:
    """The first true value of ``is_true()``.

    Raises:
        TimeoutError: if there is none in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if value := is_true():
                return value
        time.sleep(0.1)
    raise TimeoutError(f"{what}: not within {timeout_s:g} s")


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, url: str) -> None:
        """Loads a page."""
        _call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a function's body in JavaScript returns."""
        return _call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, *, timeout_s: float = 60.0) -> Any:
        """The first true value that the script returns."""
        return wait_for(lambda: self.run(script), timeout_s=timeout_s, what=script)

    def screenshot(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        path.write_bytes(base64.b64decode(_call("GET", f"{self._session}/screenshot")))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(_call("POST", f"{self._session}/print", {}))


@contextlib.contextmanager
def browser(profile: Path, *, width: int, height: int) -> Iterator[Browser]:
    """A window of that many CSS pixels; below 500 it is a telephone's, which no window could be."""
    driver, port = shutil.which("chromedriver"), free_port()
    assert driver and shutil.which("chromium"), "install chromium and chromedriver for the browser tests"
    switches = [*_SWITCHES, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    options: dict[str, Any] = {"binary": shutil.which("chromium"), "args": switches}
    if width < 500:
        options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0}}
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _call("GET", f"{root}/status")["ready"], timeout_s=30, what="chromedriver")
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = f"{root}/session/{_call('POST', f'{root}/session', wanted)['sessionId']}"
        yield Browser(session)
        _call("DELETE", session)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _call(method: str, url: str, body: dict | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["value"]
