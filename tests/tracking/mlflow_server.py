"""A real MLflow server on loopback, and a gate before it that asks for credentials."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.browser import free_port, wait_for


@contextlib.contextmanager
def mlflow_server(folder: Path, *, uri: str | None = None) -> Iterator[str]:
    """``mlflow server`` with its database and artifacts in ``folder``; gives its address.

    Args:
        folder: an existing one.
        uri: of an existing database in place of a fresh one.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri or f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "stored")]
    with open(folder / "server.log", "w") as log:
        # A group of its own: the server starts workers, and all of them must end with the test.
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(f"{address}/health"), timeout_s=90, what=f"mlflow server, see {folder}/server.log")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@contextlib.contextmanager
def gate(address: str, *, authorization: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """A proxy that passes on what carries this ``Authorization`` header and refuses the rest.

    Gives its address and a list that fills with (path, status).
    """
    seen: list[tuple[str, int]] = []
    target = address.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != authorization:
                self._answer(401, b"who are you?", {})
                return
            connection = http.client.HTTPConnection(target, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _OWN}
            connection.request(self.command, self.path, body, {**headers, "Host": target})
            response = connection.getresponse()
            kept = {name: value for name, value in response.getheaders() if name.lower() == "content-type"}
            self._answer(response.status, response.read(), kept)
            connection.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            seen.append((self.path, status))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_OWN = ("host", "authorization", "connection", "accept-encoding", "content-length", "transfer-encoding")


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.status == 200
