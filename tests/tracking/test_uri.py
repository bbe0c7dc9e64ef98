"""Where MLflow is, and what of that may be shown."""

from __future__ import annotations

import os
import shlex

import pytest

from clantune_scale.tracking.uri import hint, local_file, redact, redact_command, resolve, set_client_defaults


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
        ("https://user:p@ss@host/x", "https://***@host/x"),
        ("postgresql://u:p/w?d@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("http://host:5000/people/me@home", "http://host:5000/people/me@home"),
        ("http://host/?auth=a&pass=b;pwd=c", "http://host/?auth=***&pass=***;pwd=***"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dsecret", "mssql+pyodbc:///?odbc_connect=***"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_redact(text, shown):
    assert redact(text) == shown


def test_what_mlflow_takes_from_the_environment_is_hidden_wherever_it_turns_up(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc123xyz")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "no")
    assert redact("401: Bearer abc123xyz is not valid") == "401: Bearer *** is not valid"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train.py", "--password", "a b", "--x", "1"], "train.py --password '***' --x 1"),
        (["train.py", "--mlflow-password=ab"], "train.py '--mlflow-password=***'"),
        (["train.py", "--api_key", "a", "--auth-token=b"], "train.py --api_key '***' '--auth-token=***'"),
        (["train.py", "--tokens-per-step", "8", "--tracking_uri", "http://u:p@h"], "train.py --tokens-per-step 8 "
         "--tracking_uri 'http://***@h'"),
        (["train.py", '{"tracking_uri": "http://u:p@h"}'], """train.py '{"tracking_uri": "http://***@h"}'"""),
    ],
)  # fmt: skip
def test_a_command_line_is_shown_without_secrets(arguments, shown):
    assert redact_command(arguments) == shown


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


@pytest.mark.parametrize("name", ["what?", "a%20b", "my runs", "run#1", "100%", "a&b;c", "läufe", "it's", "what? 50%"])
def test_a_database_lies_in_its_folder_whatever_that_is_called(name, tmp_path, monkeypatch):
    from sqlalchemy import create_engine, text

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    folder.mkdir()
    uri = resolve(None, directory=folder)
    engine = create_engine(uri)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE there (x INTEGER)"))
    engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"] and local_file(uri) == folder / "mlflow.db"
    # The command that is printed runs as it is printed.
    assert shlex.split(hint(uri)) == ["mlflow", "ui", "--backend-store-uri", uri]


def test_a_server_is_no_file():
    assert local_file("http://host:5000") is None and local_file("sqlite:///:memory:") is None
