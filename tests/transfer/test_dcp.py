"""What the DCP transport refuses: metadata that nobody vouches for, folders that are not shared."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from clantune_scale.transfer import MemberState
from clantune_scale.transfer.dcp_files import CheckedReader, DcpFilesTransport, _digest
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


def test_it_sends_no_message_from_rank_to_rank():
    """Its use is where a backend has none; a group that could send one is never asked for."""

    class Group:
        member = 0

        def gather_json(self, value):
            return [value, value]

    def no_group(device):
        raise AssertionError(f"a group for {device} was asked for")

    state = _state(a=torch.ones(3))
    with tempfile.TemporaryDirectory() as folder:
        transport = DcpFilesTransport(Path(folder))
        assert transport.move(state, Route([0, 0], Group(), no_group, "pp0")) is None
        assert not list(Path(folder).iterdir())
