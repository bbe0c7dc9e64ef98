"""Rounds whose files are not what was written: every changed bit is seen, and the round before is taken."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest

from clantune_scale.checkpoint import manifest
from clantune_scale.checkpoint.restore import fault_of
from clantune_scale.distributed.topology import Topology
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking import read_events
from clantune_scale.tracking.run_dir import committed_rounds
from tests.backends.small_runs import ds_config, in_member_worlds
from tests.checkpoint.runs import launch, named, resumed
from tests.ranks import RankError, run_ranks
from tests.small_clans import clan_config

RANKS = 4
GRID = Topology.from_world(RANKS, population_size=2)


def _config(directory, **checkpoint):
    return clan_config(directory, ds_config(1), strategy="classic", total_steps=40, checkpoint=checkpoint)


def _train(rank, config, num_steps, ends):
    return launch(config, num_steps, ends=ends)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that stopped inside its third round, with two rounds on disk."""
    directory = tmp_path_factory.mktemp("runs")
    config = named(_config(directory, asynchronous=False), "damaged")
    (outcome, *_) = run_ranks(RANKS, in_member_worlds, _train, config, 12, "stop")
    assert outcome.round_name == "round-000002-step-00000012"
    assert committed_rounds(Path(outcome.run_dir) / "rounds") == [outcome.round_name, "round-000001"]
    return Path(outcome.run_dir)


@pytest.fixture
def copy(run_dir, tmp_path):
    """A copy of the run to spoil."""
    return Path(shutil.copytree(run_dir, tmp_path / "damaged"))


def _fault(folder):
    """What the clan's ranks would find, the first of it."""
    try:
        content = manifest.read(folder)
    except CheckpointError as error:
        return str(error)
    faults = (fault_of(folder, content, GRID.coordinates(rank), range(2), GRID) for rank in range(RANKS))
    return next((fault for fault in faults if fault is not None), None)


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flip(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_round_has_no_fault(run_dir):
    for name in committed_rounds(run_dir / "rounds"):
        assert _fault(run_dir / "rounds" / name) is None


def test_every_file_is_in_the_manifest_with_its_digest(run_dir):
    folder = run_dir / "rounds" / "round-000001"
    listed = {entry.path for entry in manifest.files_of(manifest.read(folder))}
    assert {path.relative_to(folder).as_posix() for path in _files(folder)} == listed | {"manifest.json"}
    assert {"member-000/.metadata", "ranks/001-001.json", "ranks/000-000.safetensors", "clan.json"} <= listed


def _flips(folder, count, seed):
    """(file, byte, bit): the first and last byte of each file, and others drawn at random."""
    generator = random.Random(seed)
    for path in _files(folder):
        size = path.stat().st_size
        for place in [0, size - 1, *(generator.randrange(size) for _ in range(count))]:
            yield path, place, generator.randrange(8)


def _undetected(folder, count, seed):
    """Flips that no rank saw, after which the manifest reads otherwise than before."""
    before = manifest.read(folder)
    missed = []
    for path, place, bit in list(_flips(folder, count, seed)):
        whole = path.read_bytes()
        _flip(path, place, bit)
        # White space between the manifest's words may change without any effect.
        if _fault(folder) is None and manifest.read(folder) != before:
            missed.append((path.name, place, bit))
        elif _fault(folder) is None:
            assert path.name == "manifest.json"
        path.write_bytes(whole)
    return missed


@pytest.mark.parametrize("name", ["round-000001", "round-000002-step-00000012"])
def test_flipped_bits_are_seen(copy, name):
    assert _undetected(copy / "rounds" / name, 4, seed=1) == []


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_seen(copy):
    folder = copy / "rounds" / "round-000001"
    assert _undetected(folder, 1000 // len(_files(folder)), seed=2) == []


@pytest.mark.parametrize("spoil", ["truncate", "remove", "empty"])
def test_a_file_that_is_cut_or_gone_is_seen(copy, spoil):
    folder = copy / "rounds" / "round-000001"
    for path in _files(folder):
        whole = path.read_bytes()
        if spoil == "remove":
            path.unlink()
        else:
            path.write_bytes(whole[:-1] if spoil == "truncate" else b"")
        fault = _fault(folder)
        assert fault is not None and path.name in fault
        path.write_bytes(whole)


def _resume_twice(rank, config, run_dir):
    whole = launch(named(config, "whole"), 17).exact
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = launch(resumed(config, run_dir), 17, seeded=9).exact
    said = [str(warning.message) for warning in caught if "damaged" in str(warning.message)]
    return {key for key in whole if whole[key] != again[key]}, said


def test_the_round_before_is_taken_and_said_aloud(copy, tmp_path):
    newest = copy / "rounds" / "round-000002-step-00000012"
    _flip(newest / "member-001" / "__1_0.distcp", 700, 3)
    (copy / "rounds" / "LATEST").write_bytes(b"\x00torn")
    leftover = copy / "rounds" / ".round-000003.1.partial"
    leftover.mkdir()
    config = _config(tmp_path)
    for different, said in run_ranks(RANKS, in_member_worlds, _resume_twice, config, copy):
        assert different == set()
        assert len(said) == 1 and "rank 3" in said[0] and "member-001/__1_0.distcp" in said[0]
    events = read_events(copy / "events.jsonl")
    (resume,) = [event for event in events if event["kind"] == "resume"]
    assert resume["step"] == 10 and resume["resumed_from"].endswith("round-000001")
    assert any(event["kind"] == "warning" and newest.name in event["message"] for event in events)
    # Nothing is thrown away: the damaged round, and the events of the steps that are done again.
    assert (copy / "rounds" / "lost-1" / newest.name / "manifest.json").exists()
    lost = read_events(copy / resume["lost_events"])
    assert lost[-1]["kind"] == "run_end" and lost[-1]["status"] == "KILLED"
    assert not leftover.exists()
    rounds = [event["round"] for event in events if event["kind"] == "round_end"]
    assert rounds == list(range(len(rounds)))


def test_with_no_whole_round_left_nothing_is_started(copy, tmp_path):
    for name in committed_rounds(copy / "rounds"):
        (copy / "rounds" / name / "clan.json").write_bytes(b"{}")
    with pytest.raises(RankError, match=r"none of the rounds .* clan\.json has 2 bytes in place of .* start anew"):
        run_ranks(RANKS, in_member_worlds, _train, resumed(_config(tmp_path), copy), 12, "leave")
    assert not (copy / "rounds" / "lost-1").exists()
