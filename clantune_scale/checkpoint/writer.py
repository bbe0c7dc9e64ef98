"""Commits rounds: first every rank's files, then the manifest, then the rename of the folder.

Each attempt has a fresh folder, ``.round-000012.1.partial``, and at most one attempt is in progress. Each rank writes
its files on a thread, so training goes on. Ranks agree on the outcome at synchronization points.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clantune_scale.checkpoint import manifest, shards
from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.checkpoint.capture import RANKS, Capture
from clantune_scale.checkpoint.files import FileEntry, sync_folder, write_new
from clantune_scale.distributed.topology import Coordinates
from clantune_scale.tracking.run_dir import committed_rounds

# Space beside the tensors: headers, numbers, the manifest and the file system's own data.
_OVERHEAD = 1.05
_OVERHEAD_BYTES = 1 << 20


@dataclass
class Attempt:
    """A round that is being written.

    Attributes:
        name: the folder's name once it is committed.
        folder: where its files go until then.
        content: the manifest's, without the files.
    """

    name: str
    folder: Path
    content: dict[str, Any]
    thread: threading.Thread | None = None
    entries: list[dict[str, Any]] | None = None
    failure: str | None = None


class RoundWriter:
    """Writes rounds into a run's ``rounds`` folder. All ranks of the clan call each method alike.

    Args:
        folder: the ``rounds`` folder, which all hosts see.
        everyone: all ranks.
        at: this rank's place.
        group: the member's ranks over gloo, used only by the writing thread.
        keep_last: number of committed rounds to keep.
        say: called on the leader with a message about a failure.

    Attributes:
        last_step: optimizer steps done in the newest round that this launch committed; known to the leader.
    """

    def __init__(
        self,
        folder: Path,
        everyone: Everyone,
        at: Coordinates,
        group: Any,
        *,
        keep_last: int,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._everyone, self._at, self._group = folder, everyone, at, group
        self._keep_last, self._say = keep_last, say
        self._attempt: Attempt | None = None
        self.last_step: int | None = None

    def begin(
        self, name: str, capture: Capture, holders: Sequence[int], content: dict[str, Any], *, wait: bool
    ) -> bool:
        """Starts writing a round; the one before must be settled first.

        Args:
            name: from :func:`clantune_scale.tracking.run_dir.round_name`.
            capture: this rank's state.
            holders: by member, the member whose tensors are also this member's.
            content: the manifest's facts about the run and the round.
            wait: whether the files are written before this returns.

        Returns:
            False if there is no room for the round; nothing is written then.
        """
        is_holder = holders[self._at.member] == self._at.member
        asked = self._everyone.gather(capture.num_bytes if is_holder else 0)
        folder = self._everyone.from_leader(self._make_room(name, sum(asked), holders))
        if folder is None:
            return False
        self._attempt = attempt = Attempt(name, Path(folder), {**content, "holders": list(holders)})
        if wait:
            self._write(attempt, capture, is_holder)
        else:
            attempt.thread = threading.Thread(
                target=self._write, args=(attempt, capture, is_holder), name="clantune-rounds", daemon=True
            )
            attempt.thread.start()
        return True

    def settle(self, *, wait: bool) -> bool:
        """Commits the attempt in progress if every rank has written its files; removes it if a rank failed.

        Args:
            wait: whether to wait for ranks that are still writing.

        Returns:
            False if a rank is still writing.
        """
        attempt = self._attempt
        if attempt is None:
            return True
        if wait and attempt.thread is not None:
            attempt.thread.join()
        is_done = attempt.thread is None or not attempt.thread.is_alive()
        said = self._everyone.gather({"done": is_done, "failure": attempt.failure, "files": attempt.entries})
        if not all(rank["done"] for rank in said):
            return False
        self._attempt = None
        failures = {rank: one["failure"] for rank, one in enumerate(said) if one["failure"] is not None}
        if self._everyone.is_leader:
            if not failures:
                files = [entry for rank in said for entry in rank["files"]]
                failures = self._try_to_commit(attempt, files)
            for rank, failure in list(failures.items())[:1]:
                shutil.rmtree(attempt.folder, ignore_errors=True)
                self._say(
                    f"{attempt.name} was not committed: rank {rank} could not write it ({failure}). Training goes on, "
                    f"and the round before remains. Check the file system of {self._folder}."
                )
        return True

    def _make_room(self, name: str, num_bytes: int, holders: Sequence[int]) -> str | None:
        """On the leader: makes an attempt's folders if the file system has room for it, and returns their path."""
        if not self._everyone.is_leader:
            return None
        try:
            free = shutil.disk_usage(self._folder).free
            needed = int(num_bytes * _OVERHEAD) + _OVERHEAD_BYTES
            if free < needed:
                self._say(
                    f"{name} was not written: it takes {needed / 1e9:.3g} GB and {self._folder} has {free / 1e9:.3g} "
                    f"GB left. Training goes on without it. Make room, or lower clantune.checkpoint.keep_last."
                )
                return None
            folder = _fresh(self._folder, name)
            (folder / RANKS).mkdir()
            for member in sorted(set(holders)):
                (folder / shards.member_folder(member)).mkdir()
        except OSError as error:
            self._say(f"{name} was not written: {error}. Training goes on without it. Check {self._folder}.")
            return None
        return str(folder)

    def _write(self, attempt: Attempt, capture: Capture, is_holder: bool) -> None:
        try:
            files = []
            if is_holder:
                # The collective goes first: ranks wait for each other in it, so none may fail before it.
                place = attempt.folder / shards.member_folder(self._at.member)
                files += shards.save(capture.tensors, place, self._at, self._group)
            files += capture.write_rank(attempt.folder, self._at)
            attempt.entries = [asdict(FileEntry.of(attempt.folder, path)) for path in files]
        # A disk fails in many ways, and none of them must reach training.
        except Exception as error:
            attempt.failure = _in_short(error)

    def _try_to_commit(self, attempt: Attempt, files: list[dict[str, Any]]) -> dict[int, str]:
        """On the leader: commits the attempt; returns what failed, by rank."""
        try:
            write_new(attempt.folder / "clan.json", json.dumps(attempt.content.pop("clan")).encode())
            entries = [*files, asdict(FileEntry.of(attempt.folder, attempt.folder / "clan.json"))]
            for inner in (path for path in attempt.folder.iterdir() if path.is_dir()):
                sync_folder(inner)
            manifest.write(attempt.folder, {**attempt.content, "name": attempt.name, "files": entries})
            os.rename(attempt.folder, self._folder / attempt.name)
            sync_folder(self._folder)
        except OSError as error:
            return {0: _in_short(error)}
        self.last_step = attempt.content["step"]
        try:
            manifest.point_latest(self._folder, attempt.name)
            self._prune()
        except OSError as error:
            self._say(f"{attempt.name} is committed, but older rounds could not be removed: {error}.")
        return {}

    def _prune(self) -> None:
        for name in committed_rounds(self._folder)[self._keep_last :]:
            # The rename comes first: a half-removed folder must not carry a round's name.
            doomed = self._folder / f".{name}.removed"
            os.rename(self._folder / name, doomed)
            shutil.rmtree(doomed)


def _fresh(folder: Path, name: str) -> Path:
    """A new folder for one attempt; a reused one could mix the files of two."""
    attempt = 1
    while True:
        path = folder / f".{name}.{attempt}.partial"
        try:
            path.mkdir()
        except FileExistsError:
            attempt += 1
            continue
        return path


def _in_short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
