"""Where MLflow is: the tracking URI of a run, what its client takes by default, and what of it may be shown."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# Up to the last @ of the authority: a password may hold one. SQLAlchemy takes user:password with slashes too, which
# a port before the path is not.
_USERINFO = re.compile(r"(?<=://)(?:[^/\s?#:@]*:(?!\d{1,5}(?:[/?#]|$|\s))[^\s@]*@(?:[^/\s?#@]*@)*|[^/\s?#]*@)")
_SECRET_WORDS = r"token|secret|passphrase|passwd|password|pwd|pass|key|sig|credential|auth|odbc_connect"
_SECRET_QUERY = re.compile(rf"(?i)(?<=[?&;])([^=&;\s]*(?:{_SECRET_WORDS})[^=&;\s]*)=[^&;\s]*")
# What MLflow and its stores read from the environment. It is in no URI, and might be in a server's answer.
_SECRET_VARIABLES = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "DATABRICKS_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
)
# Options that mean a secret; "--tokens-per-step" and "--key-size" do not.
_SECRET_OPTION = re.compile(r"(?i)^--?(?:.*[-_.])?(?:password|passwd|secret|api[-_]?key|(?:access|auth|api)[-_]token)$")

# With MLflow's own defaults (7 retries, 120 s each) a dead server holds a call for minutes; its telemetry is one more
# server to wait for.
_CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def redact(text: str) -> str:
    """``text`` without secrets: the user part and the secret query values of every URI in it, replaced by ``***``.

    So is what MLflow's own variables for tokens and passwords hold.
    """
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        # Shorter ones are parts of words.
        if len(value) >= 6:
            text = text.replace(value, "***")
    if "://" not in text:
        return text
    return _SECRET_QUERY.sub(r"\1=***", _USERINFO.sub("***@", text))


def redact_command(arguments: Sequence[str]) -> str:
    """A command line as a shell takes it, without secrets: those of URIs, and values of options such as --password."""
    shown = []
    hides_next = False
    for argument in arguments:
        option, separator, _ = argument.partition("=")
        is_secret = _SECRET_OPTION.match(option) is not None
        if hides_next:
            shown.append("***")
        else:
            shown.append(f"{option}=***" if is_secret and separator else redact(argument))
        hides_next = is_secret and not separator and not hides_next
    return shlex.join(shown)


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
