"""Where MLflow is, and what of that may be shown."""

from __future__ import annotations

import os

import pytest

from clantune_scale.tracking.uri import redact, resolve, set_client_defaults


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://user:secret@host/x", "https://***@host/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("postgresql+psycopg2://u:p@db:5432/mlflow", "postgresql+psycopg2://***@db:5432/mlflow"),
        ("https://host/?api_key=1&user=a&PASSWORD=b", "https://host/?api_key=***&user=a&PASSWORD=***"),
        ("failed for http://a:b@c and http://d:e@f", "failed for http://***@c and http://***@f"),
        ("mail me@host", "mail me@host"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_redact(text, shown):
    assert redact(text) == shown


def test_order_of_uris(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    local = resolve(None, directory=tmp_path / "runs" / ".." / "runs")
    assert local == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert resolve(None, directory=tmp_path) == "http://environment"
    assert resolve("http://config", directory=tmp_path) == "http://config"


def test_client_defaults_leave_what_the_user_set(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "x")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    set_client_defaults()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "4"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
