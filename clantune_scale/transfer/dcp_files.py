"""Torch's distributed checkpoint (DCP) as a transport over a folder that all hosts share.

It needs no point-to-point messages: state goes through files, and what ranks tell each other is gathered. Over gloo
it moved 0.19 to 0.27 GiB/s on two cores, and ``peer`` 3.2 to 4.0.

Each transfer uses a new folder and removes it afterwards. DCP's ``.metadata`` is a pickle. The donor sends its digest
to the recipients, and they do not open a file with another digest.
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

from clantune_scale.transfer.dcp_plans import (
    Named,
    WatchedLoadPlanner,
    load_one_process,
    named,
    reason,
    save_one_process,
)
from clantune_scale.transfer.route import Route
from clantune_scale.transfer.state import MemberState
from clantune_scale.transfer.transport import OnReceived

_METADATA = ".metadata"


class CheckedReader(FileSystemReader):
    """DCP's reader, which unpickles only metadata of a known digest.

    Args:
        folder: where the donor saved.
        digest: of ``.metadata``, as the donor sent it.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        super().__init__(folder)
        self._folder, self._digest = folder, digest

    def read_metadata(self, *args: Any) -> Metadata:
        # The file is read once, so that exactly the compared bytes are unpickled.
        content = (self._folder / _METADATA).read_bytes()
        found = _digest(content)
        if found != self._digest:
            raise ValueError(
                f"{_METADATA} has digest {found} and was written with digest {self._digest}: it was not opened"
            )
        metadata = pickle.loads(content)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class DcpFilesTransport:
    """DCP's own files, which the donor writes and the recipients read.

    Args:
        directory: the shared folder. It is created if it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.on_received: OnReceived | None = None

    def move(self, state: MemberState, route: Route) -> str | None:
        tensors = named(state, route.place)
        is_donor = route.before is None and route.after is not None
        folder: Path | None = None
        offered: dict[str, Any] | None = None
        try:
            if is_donor:
                folder, offered = self._save(tensors, route.place)
            offer = route.replica_group.gather_json(offered)[route.chain[0]]
            complaint = None if offered is None else offered["complaint"]
            if route.before is not None:
                complaint = offer["complaint"] or self._load(tensors, offer)
            # A barrier: the donor removes the folder when all recipients have read it.
            route.replica_group.gather_json(None)
            return complaint
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _save(self, tensors: Named, place: str) -> tuple[Path | None, dict[str, Any]]:
        """The folder that the state was saved in, and the message to the recipients."""
        folder = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"transfer-{place}-", dir=self._directory))
            # The files do not outlive the transfer. They must be visible to all hosts, but need not be synced to disk.
            save_one_process(tensors, FileSystemWriter(folder, sync_files=False))
            digest = _digest((folder / _METADATA).read_bytes())
        except (OSError, CheckpointException) as error:
            return folder, {"folder": "", "metadata": "", "complaint": f"the state was not saved: {reason(error)}"}
        return folder, {"folder": folder.name, "metadata": digest, "complaint": None}

    def _load(self, tensors: Named, offer: dict[str, Any]) -> str | None:
        folder = self._directory / offer["folder"]
        if not folder.is_dir():
            return f"{folder} does not exist on this host. Set transfer.directory to a file system that all hosts share"
        try:
            load_one_process(tensors, CheckedReader(folder, offer["metadata"]), WatchedLoadPlanner(self.on_received))
        except (OSError, CheckpointException) as error:
            return f"the state was not loaded: {reason(error)}"
        return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
