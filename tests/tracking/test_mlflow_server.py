"""A whole run against a real server, with credentials as MLflow's users set them."""

from __future__ import annotations

import base64

import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.tracking import Tracking, create_run_dir, read_events
from tests.tracking import sample_run
from tests.tracking.mlflow_server import gate, mlflow_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BASIC = "Basic " + base64.b64encode(b"ada:secret").decode()
ACCESS = {
    "basic": ({"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "secret"}, BASIC),
    "token": ({"MLFLOW_TRACKING_TOKEN": "t0ken"}, "Bearer t0ken"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


def run_through(address, tmp_path):
    settings = {"directory": str(tmp_path / "runs"), "run_name": "sample", "tracking_uri": address}
    config = ClanConfig(population_size=2, genes=["lr"], tracking=settings)
    run_dir = create_run_dir(config.tracking)
    tracking = Tracking.open(config.tracking, run_dir=run_dir, is_writer=True)
    sample_run.emit_all(tracking, config)
    tracking.close()
    return [event for event in read_events(run_dir / "events.jsonl") if event["kind"] == "warning"]


@pytest.mark.parametrize("kind", ACCESS)
def test_metrics_and_files_arrive_with_credentials_from_the_environment(server, tmp_path, monkeypatch, kind):
    from mlflow import MlflowClient

    environment, header = ACCESS[kind]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with gate(server, authorization=header) as (address, seen):
        assert run_through(address, tmp_path) == []
    assert seen and {status for _, status in seen} <= {200, 201, 404}
    # Files went the same way as metrics: through the server's own artifact store.
    assert any("mlflow-artifacts/artifacts" in path and path.endswith("report.html") for path, _ in seen)
    client = MlflowClient(tracking_uri=server)
    found = client.search_runs([client.get_experiment_by_name("clantune").experiment_id], order_by=["start_time DESC"])
    parent = next(run for run in found if run.info.run_name == "sample")
    assert parent.info.status == "FINISHED" and parent.data.metrics["fitness/best"] == 2.0
    assert "clantune.artifacts_error" not in parent.data.tags
    assert "report.html" in {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}


def test_without_credentials_there_is_one_warning_and_the_run_goes_on(server, tmp_path, monkeypatch):
    for environment, _ in ACCESS.values():
        for name in environment:
            monkeypatch.delenv(name, raising=False)
    with gate(server, authorization=BASIC) as (address, seen):
        (warning,) = run_through(address, tmp_path)
    assert "401" in warning["message"] and {status for _, status in seen} == {401}
