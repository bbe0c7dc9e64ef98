"""The list of a committed round's files: written last, read first, and protected by its own digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clantune_scale.checkpoint.files import FileEntry, replace, sync_folder, write_new
from clantune_scale.errors import CheckpointError

SCHEMA = 1
LATEST = "LATEST"


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest of a round's folder, its last file."""
    text = _canonical(content)
    sealed = json.dumps({"schema": SCHEMA, "blake2b": _digest(text), "manifest": content}, indent=1)
    write_new(folder / "manifest.json", sealed.encode())
    sync_folder(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises:
        CheckpointError: if it cannot be read, is not what was written, or is of a newer version.
    """
    path = folder / "manifest.json"
    try:
        sealed = json.loads(path.read_bytes())
        content, schema, sum_ = sealed["manifest"], sealed["schema"], sealed["blake2b"]
        is_whole = _digest(_canonical(content)) == sum_
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"manifest.json cannot be read ({type(error).__name__}: {error})") from error
    if schema != SCHEMA:
        raise CheckpointError(f"manifest.json is of schema {schema}, and this package reads {SCHEMA}")
    if not is_whole:
        raise CheckpointError("manifest.json has other content than was written (its digest differs)")
    return content


def files_of(content: Mapping[str, Any]) -> list[FileEntry]:
    """Every file of the round except the manifest."""
    return [FileEntry.from_json(entry) for entry in content["files"]]


def point_latest(folder: Path, name: str) -> None:
    """Makes ``LATEST`` in a run's ``rounds`` folder name this round."""
    replace(folder / LATEST, f"{name}\n".encode())


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
