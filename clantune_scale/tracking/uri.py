"""Where MLflow is: a run's tracking URI without its secrets, and defaults for MLflow's client."""

from __future__ import annotations

import os
import re
import shlex
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

# Matches up to the last @ of the authority, because a password may contain one. SQLAlchemy allows slashes in
# user:password. A port before the path looks similar and is excluded.
_USERINFO = re.compile(r"(?<=://)(?:[^/\s?#:@]*:(?!\d{1,5}(?:[/?#]|$|\s))[^\s@]*@(?:[^/\s?#@]*@)*|[^/\s?#]*@)")
_SECRET_WORDS = r"token|secret|passphrase|passwd|password|pwd|pass|key|sig|credential|auth|odbc_connect"
_SECRET_QUERY = re.compile(rf"(?i)(?<=[?&;])([^=&;\s]*(?:{_SECRET_WORDS})[^=&;\s]*)=[^&;\s]*")
# Secrets that MLflow and its stores read from the environment. No URI holds them, but a server's answer may.
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

# With MLflow's own defaults (7 retries of 120 s) a call to a dead server takes minutes. Its telemetry is one more
# server to wait for.
_CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def redact(text: str) -> str:
    """``text`` with ``***`` in place of secrets.

    Secrets are the user part and the secret query values of every URI, and the values of MLflow's environment
    variables for tokens and passwords.
    """
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        # A shorter value may be a part of an ordinary word.
        if len(value) >= 6:
            text = text.replace(value, "***")
    if "://" not in text:
        return text
    return _SECRET_QUERY.sub(r"\1=***", _USERINFO.sub("***@", text))


def redact_command(arguments: Sequence[str]) -> str:
    """A command line as a shell takes it. Secrets in URIs and the values of options such as --password are hidden."""
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
        configured: the config's, which has precedence.
        directory: folder of the runs. It gets the SQLite file if neither the config nor ``MLFLOW_TRACKING_URI`` names
            a server. (MLflow's own default is the current folder.)
    """
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or of_database(directory.resolve() / "mlflow.db")


def of_database(path: Path) -> str:
    """The URI of an SQLite file, whatever its folder is called.

    SQLAlchemy 2.1 decodes percent signs in the path of a URI, 2.0 does not, and both end it at a question mark. So a
    path with these letters is spelt as SQLAlchemy reads it back, or as SQLite's own kind of URI.
    """
    plain = f"sqlite:///{path}"
    if not any(letter in str(path) for letter in "?%"):
        return plain
    from sqlalchemy import make_url

    encoded = urllib.parse.quote(str(path))
    if make_url(f"sqlite:///{encoded}").database == str(path):
        return f"sqlite:///{encoded}"
    return f"sqlite:///file:{encoded}?uri=true"


def local_file(uri: str) -> Path | None:
    """The SQLite file of a URI; None for a server."""
    if not uri.startswith("sqlite:///"):
        return None
    from sqlalchemy import make_url

    path = make_url(uri).database or ""
    if path.startswith("file:"):
        path = urllib.parse.unquote(path.removeprefix("file:").partition("?")[0])
    return Path(path) if path and path != ":memory:" else None


def hint(uri: str) -> str:
    """How to look at the runs there: a command for a database, as a shell takes it, or a server's redacted address."""
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri.startswith("sqlite:") else redact(uri)


def set_client_defaults() -> None:
    """Sets the variables that the user has not set. Call it before MLflow is imported."""
    for name, value in _CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
