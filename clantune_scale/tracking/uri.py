"""Where MLflow is: the tracking URI of a run, what its client takes by default, and what of it may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

_USERINFO = re.compile(r"(?<=://)[^/@\s?#]+@")
_SECRET_QUERY = re.compile(
    r"(?i)(?<=[?&])([^=&\s]*(?:token|secret|password|passwd|pwd|key|sig|credential)[^=&\s]*)=[^&\s]*"
)

# With MLflow's own defaults (7 retries, 120 s each) a dead server holds a call for minutes; its telemetry is one more
# server to wait for.
_CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def redact(text: str) -> str:
    """``text`` with the user part and the secret query values of every URI in it replaced by ``***``."""
    if "://" not in text:
        return text
    return _SECRET_QUERY.sub(r"\1=***", _USERINFO.sub("***@", text))


def resolve(configured: str | None, *, directory: Path) -> str:
    """The tracking URI to use.

    Args:
        configured: the config's, which goes before everything.
        directory: folder of the runs; it gets the SQLite file where neither the config nor
            ``MLFLOW_TRACKING_URI`` names a server. (MLflow's own default is the current folder.)
    """
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory.resolve() / 'mlflow.db'}"


def hint(uri: str) -> str:
    """How to look at what is there: a command for a database, the redacted address of a server."""
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else redact(uri)


def set_client_defaults() -> None:
    """Sets what the user has not set, before MLflow is imported."""
    for name, value in _CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
