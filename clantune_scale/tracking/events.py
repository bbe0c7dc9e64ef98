"""The run's record: one JSON object per line. The file gets an event before MLflow and the terminal do."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from clantune_scale.errors import ClanError
from clantune_scale.tracking.uri import redact

SCHEMA = 1

# JSON has no words for these numbers. Every reader takes strings, and `read_events` turns them back into numbers.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# With these errors the file itself is wrong. With any other, such as a full disk, a quota or a server of files that is
# away, it may take the events later.
_LASTING = (errno.EBADF, errno.EINVAL, errno.EFAULT)


class EventLog:
    """Appends events to a file, each in one write to the kernel, so that a killed process loses none.

    The file is unbuffered, because a signal handler may append while the same thread is appending. What a full disk
    refuses waits in memory and is written before the next event.

    Args:
        path: the file. It must not exist unless ``continues``: no run writes into another run's record.
        continues: whether this run wrote the file in an earlier launch.
    """

    def __init__(self, path: Path, *, continues: bool = False) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | (0 if continues else os.O_EXCL), 0o644)
        self._waiting = b""

    @property
    def num_bytes(self) -> int:
        """Bytes of the record. Earlier launches of the run and what waits for room are included."""
        return os.fstat(self._file).st_size + len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Bytes that the disk had no room for."""
        return len(self._waiting)

    def append(self, kind: str, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Writes an event.

        Args:
            kind: what happened, for example ``"round_end"``.
            step: optimizer steps completed.
            fields: made of dataclasses, pydantic models, numpy values and plain data.

        Returns:
            The event as plain data, as :func:`read_events` will give it, without credentials in URIs.
        """
        event = {"schema": SCHEMA, "kind": kind, "time_s": time.time(), "step": int(step), **to_plain(fields)}
        self._write((json.dumps(_spell(event), allow_nan=False) + "\n").encode())
        return event

    def _write(self, line: bytes) -> None:
        data, self._waiting = self._waiting + line, b""
        while data:
            try:
                data = data[os.write(self._file, data) :]
            except OSError as error:
                if error.errno in _LASTING:
                    raise
                self._waiting = data + self._waiting
                return

    def close(self) -> None:
        """Closes the file. A second call does nothing."""
        if self._file >= 0:
            self._write(b"")
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def cut_events(path: Path, num_bytes: int) -> str | None:
    """Cuts a run's events at the point at which a round was captured. The rest moves to ``events.lost-N.jsonl``.

    The file is replaced, so that a program that follows it sees that it is another file.

    Args:
        path: of the events.
        num_bytes: length of what stays.

    Returns:
        The name of the file that has the rest; None if there was no rest.
    """
    if not path.exists():
        return None
    data = path.read_bytes()
    # A machine that died may have lost the file's end, so only whole lines stay.
    num_bytes = data.rfind(b"\n", 0, num_bytes) + 1
    kept, rest = data[:num_bytes], data[num_bytes:]
    if not rest:
        return None
    number = 1
    while (lost := path.with_name(f"events.lost-{number}.jsonl")).exists():
        number += 1
    for target, data in ((lost, rest), (path.with_name(".events.part"), kept)):
        with open(target, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    os.replace(path.with_name(".events.part"), path)
    return lost.name


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All events of a run, oldest first; :func:`iter_events` as a list."""
    return list(iter_events(path))


def iter_events(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events of a run, oldest first, one at a time. As objects, those of a long run of many members are gigabytes.

    An incomplete last line is left out: it is being written, or the machine died meanwhile.

    Raises:
        ClanError: if another line is not an event, or the schema is newer than this package.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                event = parse_event(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ClanError(
                    f"line {number} of {path} is not an event: {error}. Remove it or use a copy."
                ) from error
            if event is not None:
                check_schema(event, path)
                yield event


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event in a line of the file; None for an empty line.

    Raises:
        ValueError: if the line is not a JSON object with a schema and a kind.
    """
    if not line.strip():
        return None
    event = json.loads(line)
    if not (isinstance(event, dict) and isinstance(event.get("schema"), int) and "kind" in event):
        raise ValueError("there is no object with a schema and a kind")
    # Most lines have none of these words, and looking into every value takes longer than parsing.
    return _unspell(event) if any(word.encode() in line for word in _NON_FINITE) else event


def check_schema(event: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raises a ClanError that names ``path`` if the event has a newer schema than this package knows."""
    if event["schema"] > SCHEMA:
        raise ClanError(f"{path} has events of schema {event['schema']}, this package reads {SCHEMA}. Upgrade it.")


def to_plain(value: Any) -> Any:
    """``value`` as dicts, lists, strings, numbers, booleans and None."""
    if isinstance(value, BaseModel):
        return to_plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, (np.ndarray, np.generic)):
        return to_plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return redact(str(value))


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _spell(inner) for key, inner in value.items()}
    return [_spell(inner) for inner in value] if isinstance(value, list) else value


def _unspell(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _unspell(inner) for key, inner in value.items()}
    return [_unspell(inner) for inner in value] if isinstance(value, list) else value
