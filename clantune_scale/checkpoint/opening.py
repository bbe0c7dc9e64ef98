"""Decides whether a launch starts a new run or continues one, and from which of its rounds."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clantune_scale.checkpoint import manifest
from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking import FINISHED, create_run_dir
from clantune_scale.tracking.run_dir import ROUNDS, committed_rounds

VARIABLE = "CLANTUNE_RESUME"


@dataclass(frozen=True)
class Found:
    """A run that stopped.

    Attributes:
        run_dir: its folder.
        rounds: names of its committed rounds, in the order in which to try them.
    """

    run_dir: Path
    rounds: list[str]


def look_for_run(config: ClanConfig, environ: Mapping[str, str] = os.environ) -> Found | None:
    """The run that is to be continued, or None for a new one. Only one process calls it.

    Raises:
        CheckpointError: if a path was given and there is no run, or no committed round, at it.
    """
    asked = environ.get(VARIABLE) or config.checkpoint.resume
    if asked == "never":
        return None
    if asked == "latest":
        return _last_of_name(config)
    path = Path(asked).resolve()
    if (path / "manifest.json").exists():
        return Found(path.parent.parent, [path.name])
    rounds = committed_rounds(path / ROUNDS)
    if not rounds:
        raise CheckpointError(
            f"there is no committed round in {path / ROUNDS} to continue from. "
            f"Give the folder of a run or of one of its rounds, or start anew with clantune.checkpoint.resume: never."
        )
    return Found(path, rounds)


def _last_of_name(config: ClanConfig) -> Found | None:
    """The latest run of the configured name, if it has not finished and has a committed round."""
    parent, name = Path(config.tracking.directory).resolve(), config.tracking.run_name
    if name is None:
        raise CheckpointError(
            "clantune.checkpoint.resume is 'latest', which looks for a run by its name, and clantune.tracking.run_name "
            "is not set. Set it, or give the folder of the run instead of 'latest'."
        )
    pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    siblings = parent.iterdir() if parent.is_dir() else ()
    numbered = {int(m.group(1) or 1): path for path in siblings if (m := pattern.fullmatch(path.name))}
    if not numbered:
        return None
    run_dir = numbered[max(numbered)]
    rounds = committed_rounds(run_dir / ROUNDS)
    return Found(run_dir, rounds) if rounds and not _has_finished(run_dir / "events.jsonl") else None


def _has_finished(events: Path, tail_bytes: int = 1 << 16) -> bool:
    """Whether the run's last event says that it finished."""
    if not events.exists():
        return False
    with open(events, "rb") as file:
        file.seek(max(0, events.stat().st_size - tail_bytes))
        lines = [line for line in file.read().split(b"\n") if line.strip()]
    try:
        last = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return False
    return last.get("kind") == "run_end" and last.get("status") == FINISHED


@dataclass
class Opening:
    """The folder that this launch works in.

    Attributes:
        run_dir: the run's folder, on every rank.
        content: the manifest of the round to go on from; None for a new run.
        name: of that round; empty for a new run.
        refused: what was wrong with newer rounds, for the log.
    """

    run_dir: Path
    content: dict[str, Any] | None = None
    name: str = ""
    refused: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the round to go on from."""
        return self.run_dir / ROUNDS / self.name


def open_run(
    config: ClanConfig,
    everyone: Everyone,
    *,
    take: Callable[[Path], None],
    fault: Callable[[Path, dict[str, Any]], str | None],
) -> Opening:
    """Agrees on the run's folder and, if it is continued, on the newest round that all ranks can verify.

    Args:
        config: the ``clantune`` block.
        everyone: all ranks; each calls this.
        take: called on the leader with the run's folder, before anything in it is read or written.
        fault: takes a round's folder and its manifest; says what is wrong with the files that this rank reads.

    Raises:
        CheckpointError: if every round is damaged, or a given path holds no round.
    """
    said = everyone.from_leader(_look_on_leader(config, take) if everyone.is_leader else None)
    if "error" in said:
        raise CheckpointError(said["error"])
    run_dir = Path(said["run_dir"])
    if not said["rounds"]:
        return Opening(run_dir)
    refused: list[str] = []
    for name in said["rounds"]:
        content, reasons = _verified(run_dir / ROUNDS / name, everyone, fault)
        if content is not None:
            return Opening(run_dir, content, name, tuple(refused))
        refused.append(f"{name} is damaged and was not loaded: {'; '.join(reasons)}")
    raise CheckpointError(
        f"none of the rounds in {run_dir / ROUNDS} can be continued from. {'. '.join(refused)}. "
        f"Put back the files from a copy, or start anew with clantune.checkpoint.resume: never."
    )


def _look_on_leader(config: ClanConfig, take: Callable[[Path], None]) -> dict[str, Any]:
    try:
        found = look_for_run(config) or Found(create_run_dir(config.tracking), [])
        take(found.run_dir)
        (found.run_dir / ROUNDS).mkdir(exist_ok=True)
        return {"run_dir": str(found.run_dir), "rounds": found.rounds}
    except CheckpointError as error:
        return {"error": str(error)}


def _verified(
    folder: Path, everyone: Everyone, fault: Callable[[Path, dict[str, Any]], str | None]
) -> tuple[dict[str, Any] | None, list[str]]:
    """A round's manifest if every rank finds it and its own files undamaged; else what is wrong, by rank."""
    content = None
    try:
        content = manifest.read(folder)
        reason = fault(folder, content)
    except CheckpointError as error:
        reason = str(error)
    reasons = {rank: said for rank, said in enumerate(everyone.gather(reason)) if said is not None}
    return (None if reasons else content), [f"rank {rank}: {reason}" for rank, reason in list(reasons.items())[:4]]


def set_aside(rounds: Path, chosen: str) -> None:
    """Moves rounds newer than the continued one into ``lost-N``, and removes unfinished attempts.

    Only the leader calls it. The moved rounds' steps are done again, and the new rounds take their names.
    """
    newer = committed_rounds(rounds)
    newer = newer[: newer.index(chosen)]
    if newer:
        number = 1 + max((int(path.name[5:]) for path in rounds.glob("lost-*") if path.name[5:].isdigit()), default=0)
        (rounds / f"lost-{number}").mkdir()
        for name in newer:
            os.rename(rounds / name, rounds / f"lost-{number}" / name)
    for pattern in (".round-*.partial", ".round-*.removed"):
        for path in rounds.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    manifest.point_latest(rounds, chosen)
