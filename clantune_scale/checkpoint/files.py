"""Durable writes that survive a crash at any moment, and reads that detect a changed bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """A file's entry in the manifest.

    Attributes:
        path: relative to the round's folder, with forward slashes.
        num_bytes: its size.
        blake2b: hex digest of its bytes.
    """

    path: str
    num_bytes: int
    blake2b: str

    @classmethod
    def of(cls, root: Path, path: Path) -> FileEntry:
        """The entry of an existing file."""
        return cls(path.relative_to(root).as_posix(), path.stat().st_size, digest(path))

    def fault(self, root: Path) -> str | None:
        """What is wrong with the file under ``root``, or None if it is as it was written."""
        path = root / self.path
        try:
            num_bytes = path.stat().st_size
            found = digest(path) if num_bytes == self.num_bytes else ""
        except OSError as error:
            return f"{self.path} cannot be read ({error.strerror})"
        if num_bytes != self.num_bytes:
            return f"{self.path} has {num_bytes} bytes in place of {self.num_bytes}"
        return None if found == self.blake2b else f"{self.path} has other bytes than were written (its digest differs)"

    @classmethod
    def from_json(cls, data: Mapping) -> FileEntry:
        """From its entry in a manifest."""
        return cls(data["path"], data["num_bytes"], data["blake2b"])


def digest(path: Path) -> str:
    """Hex blake2b (128 bits) of a file's bytes."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def write_new(path: Path, data: bytes) -> None:
    """Writes a file and syncs it to disk; the file must not exist yet."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Replaces a file's content atomically: a reader sees the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    write_new(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Syncs a folder's entries to disk: a new name is not durable before that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
