"""Torch's distributed checkpoint (DCP) as a transport over a folder that every host sees.

It needs no point-to-point messages: state goes through files, and what ranks tell each other is gathered. Over gloo
it moved 0.19 to 0.27 GiB/s on two cores, and ``peer`` 3.2 to 4.0.

Each transfer has a fresh folder, removed afterwards. DCP's ``.metadata`` is a pickle: its digest goes through the
column, and a file that has another is not opened.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from clantune_scale.transfer.dcp_plans import Named, WatchedLoadPlanner, load_alone, named, reason, save_alone
from clantune_scale.transfer.route import Route
from clantune_scale.transfer.state import MemberState
from clantune_scale.transfer.transport import OnReceived

_METADATA = ".metadata"


class CheckedReader(FileSystemReader):
    """DCP's reader, which unpickles metadata of a known digest alone.

    Args:
        folder: what was saved.
        digest: of ``.metadata``, as the one who saved it said.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        super().__init__(folder)
        self._folder, self._digest = folder, digest

    def read_metadata(self, *args: Any) -> Metadata:
        # Read once: what was compared is what is unpickled, whatever happens to the file in between.
        content = (self._folder / _METADATA).read_bytes()
        found = _digest(content)
        if found != self._digest:
            raise ValueError(f"{_METADATA} has digest {found} and was written with {self._digest}: it was not opened")
        metadata = pickle.loads(content)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class DcpFilesTransport:
    """DCP's own files between donor and recipients.

    Args:
        directory: the shared folder; made where it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.on_received: OnReceived | None = None

    def move(self, state: MemberState, route: Route) -> str | None:
        tensors = named(state, route.place)
        is_donor = route.before is None and route.after is not None
        folder: Path | None = None
        said: dict[str, Any] | None = None
        try:
            if is_donor:
                folder, said = self._save(tensors, route.place)
            offer = route.replica_group.gather_json(said)[route.chain[0]]
            complaint = None if said is None else said["complaint"]
            if route.before is not None:
                complaint = offer["complaint"] or self._load(tensors, offer)
            # The folder stays until all have read it.
            route.replica_group.gather_json(None)
            return complaint
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _save(self, tensors: Named, place: str) -> tuple[Path | None, dict[str, Any]]:
        """Where it was saved, and what recipients are told of it."""
        folder = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"transfer-{place}-", dir=self._directory))
            # Nothing here outlives the transfer: it need not be on the disk, only seen by all.
            save_alone(tensors, FileSystemWriter(folder, sync_files=False))
            digest = _digest((folder / _METADATA).read_bytes())
        except (OSError, CheckpointException) as error:
            return folder, {"folder": "", "metadata": "", "complaint": f"it could not be saved: {reason(error)}"}
        return folder, {"folder": folder.name, "metadata": digest, "complaint": None}

    def _load(self, tensors: Named, offer: dict[str, Any]) -> str | None:
        folder = self._directory / offer["folder"]
        if not folder.is_dir():
            return f"{folder} is not seen from here: transfer.directory has to be on a file system that all hosts share"
        try:
            load_alone(tensors, CheckedReader(folder, offer["metadata"]), WatchedLoadPlanner(self.on_received))
        except (OSError, CheckpointException) as error:
            return f"it could not be loaded: {reason(error)}"
        return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
