"""Committing: whole or not at all, in fresh folders, and never at training's cost."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from clantune_scale.checkpoint import files, manifest, shards, writer
from clantune_scale.checkpoint.opening import look_for_run
from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking import read_events
from clantune_scale.tracking.run_dir import ROUNDS, committed_rounds, round_name
from tests.backends.small_runs import ds_config, in_member_worlds
from tests.checkpoint.runs import launch, named
from tests.ranks import run_ranks
from tests.small_clans import clan_config, start, train


def _config(directory, **checkpoint):
    return clan_config(directory, ds_config(1), strategy="classic", total_steps=60, checkpoint=checkpoint)


def _train(rank, config, num_steps, ends):
    return launch(config, num_steps, ends=ends)


def test_members_that_are_clones_share_one_state(tmp_path):
    config = clan_config(tmp_path, ds_config(1), strategy="clan", total_steps=60, checkpoint={"asynchronous": False})
    (outcome, *_) = run_ranks(4, in_member_worlds, _train, named(config, "clones"), 7, "stop")
    rounds = Path(outcome.run_dir) / "rounds"
    assert (rounds / "LATEST").read_text() == f"{outcome.round_name}\n"
    at_end, inside = manifest.read(rounds / "round-000000"), manifest.read(rounds / outcome.round_name)
    # Everyone took the fittest's state at the round's end, and trained apart from it since.
    assert len(set(at_end["holders"])) == 1 and inside["holders"] == [0, 1]
    assert [path.name for path in (rounds / "round-000000").glob("member-*")] == [f"member-{at_end['holders'][0]:03d}"]
    assert not list(rounds.glob(".*"))


def test_only_the_last_rounds_stay(tmp_path):
    config = named(_config(tmp_path, asynchronous=False, keep_last=3, every_rounds=2), "pruned")
    (outcome, *_) = run_ranks(2, in_member_worlds, _train, config, 50, "leave")
    names = committed_rounds(Path(outcome.run_dir) / "rounds")
    assert names == ["round-000009", "round-000007", "round-000005"]
    with pytest.raises(ValueError, match="keep_last"):
        ClanConfig(population_size=2, checkpoint={"keep_last": 1})


@pytest.mark.slow
def test_null_writes_nothing(tmp_path):
    (outcome, *_) = run_ranks(
        2, in_member_worlds, _train, named(_config(tmp_path, every_rounds=None), "no"), 11, "leave"
    )
    assert committed_rounds(Path(outcome.run_dir) / "rounds") == []


def _committed_on_the_way(rank, config):
    """What is committed when the files of round 0 are written, and after the step in which ranks compare."""
    engine, loader = start(config)
    train(engine, loader, 7)
    rounds = engine.clan.rounds
    rounds._made._attempt.thread.join()
    folder = rounds.run_dir / ROUNDS
    before = committed_rounds(folder)
    engine.clan.world.replica_group.gather_json(None)
    train(engine, loader, 8)
    engine.clan.world.replica_group.gather_json(None)
    found = before, committed_rounds(folder)
    engine.clan.finish()
    return found


def test_a_round_is_committed_soon_after_it_is_written(tmp_path):
    config = named(_config(tmp_path), "soon")
    for before, after in run_ranks(2, in_member_worlds, _committed_on_the_way, config):
        assert before == [] and after == ["round-000000"]


def _full_disk(rank, config, how):
    """Round 1 meets a full disk, on one rank or before anything is written."""
    save, usage = shards.save, shutil.disk_usage

    def save_until_full(tensors, folder, at, group):
        if "round-000001" not in str(folder):
            return save(tensors, folder, at, group)
        # No write may go beyond this many bytes: torch's writer meets the kernel's refusal half way.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return save(tensors, folder, at, group)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def little_room(path):
        calls.append(path)
        return usage(path)._replace(free=1000 if len(calls) == 2 else 1 << 40)

    calls: list = []
    if how == "middle":
        shards.save = save_until_full
    else:
        writer.shutil.disk_usage = little_room
    try:
        return launch(config, 17)
    finally:
        shards.save, writer.shutil.disk_usage = save, usage


@pytest.mark.parametrize("how", [pytest.param("before", marks=pytest.mark.slow), "middle"])
def test_a_full_disk_costs_a_round_on_disk_and_nothing_else(how, tmp_path):
    config = _config(tmp_path, asynchronous=False)
    (whole, *_) = run_ranks(2, in_member_worlds, _train, named(config, "whole"), 17, "leave")
    (outcome, *_) = run_ranks(2, in_member_worlds, _full_disk, named(config, "full"), how)
    assert outcome.exact == whole.exact
    rounds = Path(outcome.run_dir) / "rounds"
    assert committed_rounds(rounds) == ["round-000002", "round-000000"]
    assert not list(rounds.glob(".*"))
    (warning,) = [e["message"] for e in read_events(Path(outcome.run_dir) / "events.jsonl") if e["kind"] == "warning"]
    assert "round-000001" in warning and "Training goes on" in warning
    assert ("could not write it (" in warning) == (how == "middle")


def test_a_used_folder_is_never_written_into(tmp_path):
    used = tmp_path / ".round-000001.1.partial"
    used.mkdir()
    (used / "left").write_text("behind")
    fresh = writer._fresh(tmp_path, "round-000001")
    assert fresh.name == ".round-000001.2.partial" and not list(fresh.iterdir())


def test_rounds_are_found_by_their_folders_newest_first(tmp_path):
    for name in ("round-000002", "round-000010", "round-000010-step-00000123", ".round-000011.1.partial", "lost-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "round-000012").write_text("no folder")
    assert committed_rounds(tmp_path) == ["round-000010", "round-000010-step-00000123", "round-000002"]
    assert round_name(10, 123) == "round-000010-step-00000123"
    assert committed_rounds(tmp_path / "nothing") == []


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "LATEST"
    files.replace(path, b"one\n")
    files.replace(path, b"two\n")
    assert path.read_bytes() == b"two\n" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileExistsError):
        files.write_new(path, b"three")


def test_a_manifest_of_another_version_is_not_read(tmp_path):
    manifest.write(tmp_path, {"files": [], "losses": [float("inf")]})
    assert manifest.read(tmp_path)["losses"] == [float("inf")]
    path = tmp_path / "manifest.json"
    sealed = json.loads(path.read_text())
    path.write_text(json.dumps(sealed | {"schema": 2}))
    with pytest.raises(CheckpointError, match="schema 2, and this package reads 1"):
        manifest.read(tmp_path)


def _runs(directory, **finished):
    """Folders of runs, with a round each, that have finished or not."""
    for name, status in finished.items():
        run_dir = directory / name.replace("_", "-")
        (run_dir / "rounds" / "round-000000").mkdir(parents=True)
        (run_dir / "rounds" / "round-000000" / "manifest.json").write_text("{}")
        event = {"schema": 1, "kind": "run_end", "status": status} if status else {"schema": 1, "kind": "step"}
        (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")


def _look(directory, resume, environ=None, name="mine"):
    config = ClanConfig(
        population_size=2, tracking={"directory": str(directory), "run_name": name}, checkpoint={"resume": resume}
    )
    found = look_for_run(config, environ or {})
    return None if found is None else found.run_dir.name


def test_latest_goes_on_with_the_last_run_of_the_name(tmp_path):
    assert _look(tmp_path, "latest") is None
    _runs(tmp_path, mine="FINISHED", mine_2="KILLED", mine_too="KILLED")
    assert _look(tmp_path, "latest") == "mine-2"
    assert _look(tmp_path, "never") is None
    _runs(tmp_path, mine_10=None)
    assert _look(tmp_path, "latest") == "mine-10"
    _runs(tmp_path, mine_11="FINISHED")
    assert _look(tmp_path, "latest") is None
    with pytest.raises(CheckpointError, match="set it|Set it"):
        _look(tmp_path, "latest", name=None)


def test_a_path_is_a_run_or_one_of_its_rounds_and_the_environment_goes_before(tmp_path):
    _runs(tmp_path, mine="FINISHED")
    round_ = tmp_path / "mine" / "rounds" / "round-000000"
    assert _look(tmp_path, str(tmp_path / "mine")) == "mine"
    assert _look(tmp_path, "never", {"CLANTUNE_RESUME": str(round_)}) == "mine"
    assert _look(tmp_path, "latest", {"CLANTUNE_RESUME": ""}) is None
    with pytest.raises(CheckpointError, match="no committed round"):
        _look(tmp_path, str(tmp_path / "other"))


def test_tensors_go_through_dcp_by_the_ranks_place(tmp_path):
    from clantune_scale.distributed.topology import Coordinates

    at = Coordinates(0, 0, 0, pp=0, dp=0, tp=0)
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.tensor([1, 2], dtype=torch.int64)}
    place = tmp_path / "member-000"
    key = {shards._key(name, at): tensor for name, tensor in tensors.items()}
    with pytest.warns(UserWarning, match="torch.distributed is"):
        dcp.save(key, checkpoint_id=place)
    targets = {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()}
    shards.load(targets, place, at)
    assert all(torch.equal(targets[name], tensors[name]) for name in tensors)
    assert shards.is_read_by("member-000/__0_0.distcp", 0, at) and shards.is_read_by("member-000/.metadata", 0, at)
    assert not shards.is_read_by("member-001/.metadata", 0, at) and not shards.is_read_by(
        "member-000/__1_0.distcp", 0, at
    )
