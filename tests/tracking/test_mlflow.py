"""Events in a real MLflow store, queried through its client."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import ClanError
from clantune_scale.tracking.events import EventLog, read_events
from clantune_scale.tracking.mlflow import MlflowRecorder, upload
from clantune_scale.tracking.mlflow_names import allowed
from clantune_scale.tracking.uri import resolve
from tests.tracking import sample_run, simulated_run

CONFIG = ClanConfig(population_size=2, genes=["lr", "dropout"])


class Recording:
    """Events into the file alone, as a run leaves them that MLflow did not get."""

    def __init__(self, run_dir):
        run_dir.mkdir()
        self.log = EventLog(run_dir / "events.jsonl")

    def emit(self, kind, step, **fields):
        self.log.append(kind, step, fields)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One database for the module: its creation takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uri(store):
    return f"sqlite:///{store / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def uploaded(store, uri, client):
    """A finished run and its two children."""
    recording = Recording(store / "finished")
    sample_run.emit_all(recording, CONFIG, rounds=2)
    picture = store / "finished" / "genes.png"
    picture.write_bytes(b"\x89PNG")
    artifacts = {"genes": picture, "champion": store / "finished" / "champion.safetensors"}
    recording.emit("run_end", 20, status="FINISHED", champion=0, champion_loss=2.0, artifacts=artifacts)
    parent = client.get_run(upload(store / "finished", uri=uri))
    return parent, children_of(client, parent)


def children_of(client, parent):
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["start_time ASC"]
    )
    return sorted(found, key=lambda run: run.data.tags["clantune.member"])


def history(client, run, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def test_parent_has_config_and_versions(uploaded, client):
    parent, _ = uploaded
    assert parent.info.run_name == "sample" and parent.info.status == "FINISHED"
    assert parent.data.params["config.population_size"] == "2" and parent.data.params["batch.member_batch"] == "16"
    assert parent.data.params["gene.lr.scale"] == "log" and parent.data.params["topology.dp"] == "2"
    assert parent.data.tags["version.torch"] == "2.13.0" and parent.data.tags["clantune.champion"] == "0"
    assert client.get_experiment(parent.info.experiment_id).name == "clantune"


def test_parent_has_the_clans_metrics(uploaded, client):
    parent, _ = uploaded
    assert history(client, parent, "seconds/evaluation") == [(10, 0.25), (20, 0.25)]
    assert history(client, parent, "consensus/lr") == [(10, 1.0), (20, 1.0)]
    assert history(client, parent, "train/loss") == [(10, 4.0), (20, 3.0)]
    assert history(client, parent, "fitness/best") == [(10, 3.0), (20, 2.0)]


def test_each_member_is_a_child_with_genes_fitness_and_lineage(uploaded, client):
    _, children = uploaded
    assert [child.info.run_name for child in children] == ["sample/member-0", "sample/member-1"]
    assert {child.info.status for child in children} == {"FINISHED"}
    assert history(client, children[1], "fitness/loss") == [(10, 3.1), (20, 2.1)]
    assert history(client, children[1], "gene/dropout") == [(10, 0.1), (20, 0.1)]
    assert history(client, children[1], "step_size/lr") == [(10, 0.1), (20, 0.1)]
    assert history(client, children[1], "lineage/donor") == [(10, 0.0), (20, 0.0)]
    assert history(client, children[1], "learning_rate") == [(10, 2e-3), (20, 2e-3)]
    assert children[1].data.tags["clantune.donor"] == "0" and children[1].data.tags["clantune.ranks"] == "[2, 3]"


def artifacts_of(client, run, folder=None):
    return {artifact.path for artifact in client.list_artifacts(run.info.run_id, folder)}


def test_files_are_uploaded_and_weights_are_not(uploaded, client):
    parent, _ = uploaded
    files = {"events.jsonl", "lineage.json", "schedule.json", "report.html", "genes.png", "figures"}
    assert artifacts_of(client, parent) == files
    assert "figures/fitness.png" in artifacts_of(client, parent, "figures")
    assert parent.data.tags["clantune.artifact.champion"].endswith("champion.safetensors")
    assert "clantune.artifacts_error" not in parent.data.tags


def test_all_that_a_round_measured_is_a_metric_by_optimizer_step(store, uri, client):
    run_dir = simulated_run.write(store / "measured", num_rounds=2, num_members=4)
    parent = client.get_run(upload(run_dir, uri=uri))
    child = children_of(client, parent)[2]
    of_child = {"gradient_norm", "drift", "alignment", "strikes", "step_size/dropout", "gene/lr", "learning_rate"}
    of_parent = {"drift/mean", "drift/largest", "alignment/least", "gradient_norm/mean", "fitness/worst", "samples"}
    assert of_child <= set(child.data.metrics) and of_parent <= set(parent.data.metrics)
    assert history(client, child, "strikes") == [(20, 1.0), (40, 1.0)]
    assert history(client, parent, "strikes/sum") == [(20, 1.0), (40, 1.0)]
    assert history(client, parent, "lineage/clones") == [(20, 1.0), (40, 1.0)]
    assert history(client, parent, "tokens") == [(20, 16 * 128 * 20), (40, 16 * 128 * 40)]
    assert history(client, parent, "throughput/competitive_samples_per_s") == [(20, 128.0), (40, 128.0)]
    assert history(client, parent, "straggler/seconds") == [(20, 0.0), (40, 0.5)]


def test_a_genes_name_that_mlflow_refuses_is_spelt_so_that_it_takes_it(store, uri, client):
    run_dir = simulated_run.write(store / "named", num_rounds=1, num_members=4)
    path = run_dir / "events.jsonl"
    path.write_text(path.read_text().replace('"dropout"', '"dröp,out(1)"'))
    parent = client.get_run(upload(run_dir, uri=uri))
    assert allowed("consensus/dröp,out(1)") in parent.data.metrics


def test_phases_are_a_wave_over_the_steps(store, uri, client):
    recording = Recording(store / "phases")
    recording.emit("run_start", 0, **sample_run.start(CONFIG))
    for step, phase in ((0, "cooperative"), (8, "competitive")):
        recording.emit("phase_start", step, round=0, phase=phase, num_steps=8)
    parent = client.get_run(upload(store / "phases", uri=uri))
    assert history(client, parent, "phase/competitive") == [(0, 0.0), (8, 1.0)]


def test_times_are_those_of_the_events(uploaded):
    parent, _ = uploaded
    assert 0 <= parent.info.end_time - parent.info.start_time < 60_000


def test_a_second_upload_makes_fresh_runs_and_leaves_the_first(uploaded, store, uri, client):
    parent, _ = uploaded
    again = client.get_run(upload(store / "finished", uri=uri))
    assert again.info.run_id != parent.info.run_id
    assert again.data.metrics == parent.data.metrics and len(children_of(client, again)) == 2
    assert len(client.get_metric_history(parent.info.run_id, "train/loss")) == 2


def test_a_run_without_an_end_was_killed(store, uri, client):
    sample_run.emit_all(Recording(store / "died"), CONFIG, rounds=1)
    parent = client.get_run(upload(store / "died", uri=uri))
    assert {run.info.status for run in (parent, *children_of(client, parent))} == {"KILLED"}


def test_a_diverged_member_is_nan_not_a_huge_number(store, uri, client):
    recording = Recording(store / "diverged")
    recording.emit("run_start", 0, **sample_run.start(CONFIG))
    fields = sample_run.round_end(CONFIG, 0)
    fields["members"][1]["loss"] = math.inf
    recording.emit("round_end", 10, **fields)
    parent = client.get_run(upload(store / "diverged", uri=uri))
    assert math.isnan(children_of(client, parent)[1].data.metrics["fitness/loss"])
    assert parent.data.metrics["fitness/best"] == 3.0


def test_the_environments_run_id_changes_nothing(uploaded, store, uri, client, monkeypatch):
    parent, _ = uploaded
    monkeypatch.setenv("MLFLOW_RUN_ID", parent.info.run_id)
    assert upload(store / "finished", uri=uri) != parent.info.run_id


def test_a_stored_uri_without_its_credentials_is_refused(store, tmp_path):
    tracking = {"tracking_uri": "http://me:secret@host"}
    config = ClanConfig(population_size=2, tracking=tracking)
    sample_run.emit_all(Recording(tmp_path / "run"), config, rounds=1)
    with pytest.raises(ClanError, match=r"http://\*\*\*@host had credentials.*--tracking-uri"):
        upload(tmp_path / "run")


def test_an_event_before_the_start_is_an_error(store, uri):
    recorder = MlflowRecorder(uri, experiment="clantune", run_dir=store / "none")
    with pytest.raises(ClanError, match="'step' came before run_start"):
        recorder.record({"kind": "step", "step": 1, "time_s": 0.0, "loss": 1.0, "step_s": 1.0, "samples": 1})


def test_command_line(store, uri, client):
    sample_run.emit_all(Recording(store / "spooled"), CONFIG, rounds=1)
    command = [sys.executable, "-m", "clantune_scale.tracking.mlflow", str(store / "spooled"), "--tracking-uri", uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.split()[-1]
    assert client.get_run(run_id).info.status == "KILLED"
    assert "Traceback" not in done.stderr and "RuntimeWarning" not in done.stderr


def _first_launch(store, uri, name, rounds=2):
    """A live run whose process died: its folder, and the recorder that it had."""
    recording = Recording(store / name)
    sample_run.emit_all(recording, CONFIG, rounds=rounds)
    recorder = MlflowRecorder(uri, experiment="clantune", run_dir=store / name, is_live=True)
    for event in read_events(store / name / "events.jsonl"):
        recorder.record(event)
    return recording, recorder


def _resume(recording, uri, run_dir, members=2):
    """The launch after it."""
    fields = {"name": "sample", "resumed_from": str(run_dir / "rounds" / "round-000000"), "population_size": members}
    recording.emit("resume", 10, **fields)
    recorder = MlflowRecorder(uri, experiment="clantune", run_dir=run_dir, is_live=True)
    resume = read_events(run_dir / "events.jsonl")[-1]
    recorder.record(resume)
    recorder.record(recording.log.append("round_end", 20, sample_run.round_end(CONFIG, 1)))
    return recorder


def test_a_resumed_run_goes_on_in_the_same_runs(store, uri, client):
    recording, first = _first_launch(store, uri, "resumed")
    for run in (first.parent, *first.children):
        client.set_terminated(run, status="KILLED")
    second = _resume(recording, uri, store / "resumed")
    assert (second.parent, second.children) == (first.parent, first.children)
    parent = client.get_run(first.parent)
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["clantune.resumed_from"].endswith("round-000000")
    assert [step for step, _ in history(client, parent, "fitness/best")] == [10, 20, 20]


def test_runs_that_the_store_does_not_know_are_made_from_the_file(store, uri, client):
    recording, first = _first_launch(store, uri, "unknown", rounds=1)
    (store / "unknown" / "mlflow.json").unlink()
    second = _resume(recording, uri, store / "unknown", members=3)
    assert second.parent != first.parent and len(second.children) == 3
    parent = client.get_run(second.parent)
    assert [step for step, _ in history(client, parent, "fitness/best")] == [10, 20]
    assert client.get_run(second.children[2]).info.run_name == "sample/member-2"


@pytest.mark.slow
def test_runs_that_begin_at_once_in_a_fresh_folder_are_all_recorded(tmp_path):
    from mlflow import MlflowClient

    folder = tmp_path / "what? a%20b"
    folder.mkdir()
    names = ["first", "second", "third"]
    for name in names:
        sample_run.emit_all(Recording(folder / name), CONFIG, rounds=1)
    command = [sys.executable, "-m", "clantune_scale.tracking.mlflow"]
    begun = [subprocess.Popen([*command, str(folder / name)], stderr=subprocess.PIPE, text=True) for name in names]
    errors = [process.communicate()[1] for process in begun]
    assert [process.returncode for process in begun] == [0, 0, 0], errors
    client = MlflowClient(tracking_uri=resolve(None, directory=folder))
    (experiment,) = [one for one in client.search_experiments() if one.name == "clantune"]
    assert len(client.search_runs([experiment.experiment_id])) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["what? a%20b"]
