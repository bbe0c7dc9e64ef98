"""A member dies and the others go on, as a run that was resumed with fewer members would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from clantune_scale.bench.faults import processes
from clantune_scale.bench.faults.injector import Fault
from tests.distributed.elastic import jobs


def resumed(folder: Path, round_name: str, population_size: int) -> Path:
    """The folder of a plain launch that resumed a copy of the run from one of its rounds, with fewer members."""
    copy = folder / "resumed"
    shutil.copytree(folder / "run", copy / "run", ignore=shutil.ignore_patterns(".lock"))
    settings = jobs.block(copy, population_size=population_size)
    del settings["faults"]
    settings["checkpoint"] |= {"allow": ["population_size"], "resume": str(copy / "run" / "rounds" / round_name)}
    ended = processes.run(
        population_size, jobs.train, str(copy), settings, population_size, preload=jobs.PRELOAD, timeout_s=100
    )
    assert [rank.code for rank in ended] == [0] * population_size, ended[0].text
    return copy


def assert_alike(folder: Path, survivors: list[int], reference: Path) -> None:
    for place, member in enumerate(survivors):
        ours, theirs = jobs.weights(folder, member), jobs.weights(reference, place)
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), (member, name)


@pytest.mark.slow
def test_survivors_of_a_death_inside_a_phase_go_on_as_a_resumed_run(tmp_path):
    ended = processes.run(
        3, jobs.train, str(tmp_path), jobs.block(tmp_path), 3, faults=[Fault(1, "forward", 7)], preload=jobs.PRELOAD
    )
    assert [rank.code for rank in ended] == [0, -9, 0], ended[0].text
    assert [rank.num_starts for rank in ended] == [2, 1, 2]
    (lost,) = jobs.events(tmp_path, "member_lost")
    assert list(lost["members"]) == ["1"] and lost["left"] == [0, 2] and lost["generation"] == 1
    assert lost["step"] == 5 and lost["seconds"] > 0 and "member" in lost["reason"]
    assert jobs.events(tmp_path, "run_end")[-1]["status"] == "FINISHED"
    assert_alike(tmp_path, [0, 2], resumed(tmp_path, "round-000000", 2))


def lived(folder: Path, *faults: Fault, members: int = 3, dp: int = 1, **settings: float) -> list[processes.Ended]:
    return processes.run(
        members * dp,
        jobs.train,
        str(folder),
        jobs.block(folder, population_size=members, **settings),
        members,
        dp,
        faults=faults,
        preload=jobs.PRELOAD,
    )


@pytest.mark.slow
def test_who_serves_the_store_and_writes_the_record_may_die(tmp_path):
    ended = lived(tmp_path, Fault(0, "forward", 7))
    assert [rank.code for rank in ended] == [-9, 0, 0], ended[1].text
    (lost,) = jobs.events(tmp_path, "member_lost")
    assert lost["members"] == {"0": "none of its ranks came"} and lost["left"] == [1, 2]
    (resume,) = jobs.events(tmp_path, "resume")
    assert resume["resumed_from"].endswith("round-000000") and resume["population_size"] == 2
    assert jobs.rounds(tmp_path)[-1] == "round-000001"
    assert jobs.events(tmp_path, "run_end")[-1]["status"] == "FINISHED"


@pytest.mark.slow
def test_a_users_error_ends_its_member_and_no_other(tmp_path):
    ended = lived(tmp_path, Fault(1, "forward", 7, "raise"))
    assert [rank.code for rank in ended] == [0, 1, 0], ended[0].text
    assert [rank.num_starts for rank in ended] == [2, 1, 2]
    assert "InjectedError: an injected error" in ended[1].text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "step", "round_name"),
    [
        ("evaluation", 10, "round-000000"),
        ("decision", 10, "round-000000"),
        ("transfer", 10, "round-000000"),
        ("transfer:after", 10, "round-000000"),
        ("commit", 10, "round-000000"),
        ("commit:after", 10, "round-000001"),
        ("step", 11, "round-000001"),
    ],
)
def test_survivors_go_on_from_the_last_committed_round(tmp_path, point, step, round_name):
    ended = lived(tmp_path, Fault(1, point, step))
    assert [rank.code for rank in ended] == [0, -9, 0], ended[0].text
    (resume,) = jobs.events(tmp_path, "resume")
    assert resume["resumed_from"].endswith(round_name)
    assert_alike(tmp_path, [0, 2], resumed(tmp_path, round_name, 2))


@pytest.mark.slow
def test_with_too_few_members_the_run_stops(tmp_path):
    ended = lived(tmp_path, Fault(1, "forward", 7), min_members=3)
    assert [rank.code for rank in ended] == [1, -9, 1]
    for rank in (0, 2):
        assert "2 members are left and clantune.faults.min_members is 3 (member 1: none" in ended[rank].text
        assert f"CLANTUNE_RESUME={tmp_path / 'run'}" in ended[rank].text


@pytest.mark.slow
def test_where_no_member_may_die_one_ends_the_run(tmp_path):
    ended = lived(tmp_path, Fault(1, "forward", 7), min_members=None)
    assert [rank.code for rank in ended] == [1, -9, 1] and [rank.num_starts for rank in ended] == [1, 1, 1]
    assert f"CLANTUNE_RESUME={tmp_path / 'run'}" in ended[0].text


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_who_hangs_counts_as_dead(tmp_path, stopped):
    ended = lived(tmp_path, Fault(stopped, "forward", 7, "stop"), deadline_s=5.0)
    codes = [rank.code for rank in ended]
    assert codes == [-9 if rank == stopped else 0 for rank in range(3)], ended[2].text
    assert jobs.events(tmp_path, "member_lost")[0]["members"] == {str(stopped): "none of its ranks came"}


@pytest.mark.slow
def test_a_member_fails_as_a_whole(tmp_path):
    ended = lived(tmp_path, Fault(3, "forward", 7), members=3, dp=2)
    assert [rank.code for rank in ended] == [0, 0, 1, -9, 0, 0], ended[0].text
    assert "generation 1 began without member 1: of its 2 ranks, 1 did not come" in ended[2].text
    reference = tmp_path / "resumed"
    assert not reference.exists()


@pytest.mark.slow
def test_members_die_one_after_the_other(tmp_path):
    faults = [Fault(3, "forward", 7), Fault(0, "forward", 8, generation=1)]
    ended = lived(tmp_path, *faults, members=4)
    assert [rank.code for rank in ended] == [-9, 0, 0, -9], ended[1].text
    assert [rank.num_starts for rank in ended] == [2, 3, 3, 1]
    told = [event["left"] for event in jobs.events(tmp_path, "member_lost")]
    # The first was told after the round from which the second generation resumed: its event is behind that round.
    assert told[-1] == [1, 2]


@pytest.mark.slow
def test_without_a_committed_round_the_others_begin_anew(tmp_path):
    ended = lived(tmp_path, Fault(1, "forward", 2))
    assert [rank.code for rank in ended] == [0, -9, 0], ended[0].text
    assert not jobs.events(tmp_path, "run_end")
    assert (tmp_path / "run-2" / "events.jsonl").exists()


@pytest.mark.slow
def test_a_death_while_survivors_meet(tmp_path):
    ended = lived(tmp_path, Fault(1, "forward", 7), Fault(3, "join", generation=1), members=4)
    assert [rank.code for rank in ended] == [0, -9, 0, -9], ended[0].text
    assert jobs.events(tmp_path, "run_end")[-1]["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("point", ["finish", "champion"])
def test_a_death_at_the_end(tmp_path, point):
    ended = lived(tmp_path, Fault(1, point))
    assert [rank.code for rank in ended] == [0, -9, 0], ended[0].text
    assert jobs.events(tmp_path, "run_end")[-1]["status"] == "FINISHED"


@pytest.mark.slow
def test_who_dies_while_the_champion_is_written_is_not_waited_for(tmp_path):
    settings = jobs.block(tmp_path, min_members=None, deadline_s=4.0)
    settings["checkpoint"] |= {"champion": True}
    fault = Fault(1, "champion")
    ended = processes.run(3, jobs.train, str(tmp_path), settings, 3, faults=[fault], preload=jobs.PRELOAD)
    assert [rank.code for rank in ended] == [1, -9, 1]
    assert "rank 0 of member 1 sent no heartbeat for 4 s, while the others waited for it" in ended[0].text
    assert f"CLANTUNE_RESUME={tmp_path / 'run'}" in ended[0].text


@pytest.mark.slow
def test_survivors_go_on_in_the_same_mlflow_runs(tmp_path):
    from mlflow import MlflowClient

    settings = jobs.block(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings["tracking"] |= {"mlflow": True, "tracking_uri": uri}
    fault = Fault(0, "forward", 12)
    ended = processes.run(
        3, jobs.train, str(tmp_path), settings, 3, faults=[fault], preload=jobs.PRELOAD, timeout_s=300
    )
    assert [rank.code for rank in ended] == [-9, 0, 0], ended[1].text
    client = MlflowClient(uri)
    (experiment,) = [one for one in client.search_experiments() if one.name == "clantune"]
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1 and len(found) == 4, [run.info.run_name for run in found]
    assert parents[0].info.status == "FINISHED"
    assert not [run.info.run_name for run in found if run.info.status == "RUNNING"]
    # Both rounds are there, whichever process measured them, and each once but for the one that was measured again.
    children = [run for run in found if run is not parents[0]]
    steps = [{m.step for m in client.get_metric_history(run.info.run_id, "fitness/loss")} for run in children]
    assert sorted(map(sorted, steps))[-2:] == [[5, 10], [5, 10]], steps
