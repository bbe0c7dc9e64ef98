"""The list of a committed round's files: written last, read first, and protected by its own digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clantune_scale.checkpoint.files import FileEntry, replace, sync_folder, write_new
from clantune_scale.errors import CheckpointError

SCHEMA = 1
FOLDER = "rounds"
LATEST = "LATEST"
_NAME = re.compile(r"round-(\d{6,})(?:-step-(\d{8,}))?")


def round_name(index: int, step: int | None = None) -> str:
    """The folder's name for a finished round, or for one stopped after ``step`` optimizer steps of the run."""
    return f"round-{index:06d}" if step is None else f"round-{index:06d}-step-{step:08d}"


def committed(folder: Path) -> list[str]:
    """Names of the rounds in a run's ``rounds`` folder, newest first.

    A folder gets a round's name only once its files are complete, so ``LATEST`` is not needed to find it. A crash
    between the rename and the update of ``LATEST`` leaves a ``LATEST`` that names the round before.
    """
    found = [match for path in _children(folder) if (match := _NAME.fullmatch(path.name))]
    return [match.group(0) for match in sorted(found, key=_age, reverse=True)]


def _children(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _age(match: re.Match[str]) -> tuple[int, float]:
    # A state from inside a round is older than the round's end.
    return int(match.group(1)), float(match.group(2)) if match.group(2) else float("inf")


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
