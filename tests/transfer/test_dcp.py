"""What DCP transports refuse: metadata that nobody vouches for, folders that are not shared, plans that do not fit."""

from __future__ import annotations

import pickle
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from clantune_scale.transfer import MemberState
from clantune_scale.transfer.dcp_files import CheckedReader, DcpFilesTransport, _digest
from clantune_scale.transfer.dcp_peer import DcpPeerTransport
from clantune_scale.transfer.dcp_plans import WatchedLoadPlanner, load_one_process, named, save_one_process
from clantune_scale.transfer.route import Route


def _state(**tensors: torch.Tensor) -> MemberState:
    return MemberState(list(tensors.items()), {}, load_scalars=lambda s: None, refresh=lambda: None)


class Harmful:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.write_text, (self._path, "code was run")


def test_metadata_of_another_digest_is_never_unpickled(tmp_path):
    folder, traces = tmp_path / "saved", tmp_path / "traces"
    save_one_process(named(_state(a=torch.ones(3)), "pp0"), FileSystemWriter(folder))
    digest = _digest((folder / ".metadata").read_bytes())
    target = named(_state(a=torch.zeros(3)), "pp0")
    load_one_process(target, CheckedReader(folder, digest), WatchedLoadPlanner(None))
    assert torch.equal(target["pp0/a"], torch.ones(3))
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful(traces)))
    with pytest.raises(CheckpointException, match="it was not opened"):
        load_one_process(target, CheckedReader(folder, digest), WatchedLoadPlanner(None))
    assert not traces.exists()
    # The test's pickle does what it says.
    pickle.loads((folder / ".metadata").read_bytes())
    assert traces.exists()


def test_a_folder_that_this_host_does_not_see_is_said(tmp_path):
    transport = DcpFilesTransport(tmp_path / "elsewhere")
    complaint = transport._load({}, {"folder": "transfer-1", "metadata": "", "complaint": None})
    assert "transfer-1 does not exist on this host. Set transfer.directory to a file system" in complaint


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    _, said = DcpFilesTransport(tmp_path / "file")._save(named(_state(a=torch.ones(3)), "pp0"), "pp0")
    assert said["complaint"].startswith("the state was not saved: FileExistsError")


class Wire:
    """Messages between threads, as a group of ranks carries them; one member's end.

    Args:
        lines: by (sender, receiver), shared by all ends.
        member: whose.
    """

    def __init__(self, lines: dict, member: int) -> None:
        self._lines, self._member = lines, member

    def send(self, tensors, member, tag):
        self._lines[self._member, member].put(tensors[0].clone())
        return SimpleNamespace(wait=lambda: None)

    def recv(self, tensors, member, tag):
        tensors[0].copy_(self._lines[member, self._member].get(timeout=10))
        return SimpleNamespace(wait=lambda: None)


def _move(states: list[MemberState]) -> tuple[list[str | None], dict]:
    """Member 0's state to all others, each in a thread; what each says, and what is left on the wires."""
    lines = {(a, b): queue.Queue() for a in range(len(states)) for b in range(len(states))}

    def move(member):
        replica_group = SimpleNamespace(member=member)
        route = Route([0] * len(states), replica_group, lambda device: Wire(lines, member), "pp0")
        return DcpPeerTransport(bucket_bytes=64).move(states[member], route)

    with ThreadPoolExecutor(len(states)) as pool:
        return list(pool.map(move, range(len(states)))), lines


def test_dcps_planner_finds_what_does_not_fit_before_a_byte_is_sent():
    fits = {"a": torch.zeros(30), "b": torch.zeros(2, 3)}
    donor = _state(a=torch.ones(30), b=torch.ones(2, 3))
    for wrong, expected in [
        ({"a": torch.zeros(31), "b": torch.zeros(2, 3)}, "Size mismatch"),
        ({"a": torch.zeros(30), "c": torch.zeros(2, 3)}, "Missing key"),
        (
            {"a": torch.zeros(30, dtype=torch.float64), "b": torch.zeros(2, 3)},
            "arrives as float32 and is torch.float64",
        ),
        ({"a": torch.zeros(30)}, "arrives, and this rank has no tensor of this size"),
    ]:
        for last in (wrong, fits):
            first = fits if last is wrong else wrong
            said, lines = _move([donor, _state(**first), _state(**last)])
            # The donor sends nothing where one in the chain cannot take it, and all of the chain are told why.
            assert said[0] is None and expected in said[1] and expected in said[2], said
            assert all(line.empty() for line in lines.values())
            assert all(not bool(tensor.any()) for tensor in (*first.values(), *last.values()))


def test_what_fits_arrives_down_the_chain():
    states = [_state(a=torch.full((30,), float(m)), b=torch.full((2, 3), m + 0.5)) for m in (7, 8, 9)]
    said, lines = _move(states)
    assert said == [None] * 3 and all(line.empty() for line in lines.values())
    assert all(bool((dict(state.tensors)["b"] == 7.5).all()) for state in states)
