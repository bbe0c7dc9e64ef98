"""Observes training: mean loss and time per step, and whether members read the data that the phase requires."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.data.containers import tensors_in
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.transfer.state import bytes_digest


class LossMeter:
    """Mean training loss and time per step since the last reading. Only a reading waits for the device."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._round_total: torch.Tensor | None = None
        self._nonfinite_count: torch.Tensor | None = None
        self._count = self._round_count = 0
        self._since = time.perf_counter()

    def add(self, loss: Any) -> None:
        """Adds one micro-batch's loss. Anything but a one-element tensor is ignored."""
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            value = loss.detach().float().reshape(())
            self._total = value if self._total is None else self._total + value
            self._round_total = value.double() if self._round_total is None else self._round_total + value
            is_nonfinite = (~value.isfinite()).long()
            self._nonfinite_count = (
                is_nonfinite if self._nonfinite_count is None else self._nonfinite_count + is_nonfinite
            )
            self._count += 1
            self._round_count += 1

    def read_nonfinite_counts(self) -> int:
        """The number of micro-batches since the last call whose loss was not finite."""
        nonfinite_counts, self._nonfinite_count = self._nonfinite_count, None
        return 0 if nonfinite_counts is None else int(nonfinite_counts)

    @property
    def round_losses(self) -> tuple[float, int]:
        """(sum, number) of the losses of this rank's micro-batches in the round so far."""
        return 0.0 if self._round_total is None else float(self._round_total), self._round_count

    def begin_round(self, total: float = 0.0, count: int = 0) -> None:
        """Starts a round, or continues a resumed one from its ``round_losses``."""
        self._round_total, self._round_count = torch.tensor(total, dtype=torch.float64) if count else None, count

    def read(self, num_steps: int) -> tuple[float | None, float]:
        """(mean loss, seconds per step) since the last reading. The loss is None if none was added.

        Args:
            num_steps: optimizer steps since then.
        """
        now = time.perf_counter()
        mean = float(self._total) / self._count if self._total is not None else None
        seconds = (now - self._since) / max(1, num_steps)
        self._total, self._count, self._since = None, 0, now
        return mean, seconds


@dataclass
class Stopwatch:
    """Seconds of the round by activity."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, what: str) -> None:
        """Adds the time since the last call to ``what``."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._since
        self._since = now

    def empty(self) -> dict[str, float]:
        """Returns the seconds by activity and starts over."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class BatchWatch:
    """Compares digests of each phase's first batch over the replica group, at the end of the round.

    Members should read different data in a cooperative phase and the same data in a competitive one. A loader that
    does not follow the phases would shrink the clan's batch, or make fitness depend on the data, without an error.

    Args:
        replica_group: this rank and its peers.
    """

    def __init__(self, replica_group: ReplicaGroup) -> None:
        self._replica_group = replica_group
        self._pending: PhaseKind | None = None
        self._seen: list[list[Any]] = []
        self._has_warned: set[str] = set()

    def begin(self, phase: Phase) -> None:
        """Starts a phase. Its first batch is the next one. Teams split the data, so their phases are not compared."""
        self._pending = phase.kind if phase.teams is None else None

    def on_batch(self, args: tuple, kwargs: dict) -> None:
        """Takes the arguments of a training forward pass."""
        if self._pending is None:
            return
        digests = [bytes_digest(_as_bytes(t)) for t in tensors_in((args, kwargs)) if t.numel()]
        self._seen.append([self._pending.value, digests])
        self._pending = None

    def compare(self) -> list[str]:
        """What is wrong with the data of the phases since the last call. Each complaint comes once in a run.

        All ranks of the clan call it. It also warns.
        """
        by_member = self._replica_group.gather_json(self._seen)
        self._seen = []
        if self._replica_group.size == 1:
            return []
        complaints = []
        for phase in zip(*by_member, strict=False):
            kind = phase[0][0]
            digests = [repr(digest) for _, digest in phase]
            if kind == PhaseKind.COOPERATIVE.value and len(set(digests)) < len(digests):
                same = [member for member, digest in enumerate(digests) if digests.count(digest) > 1]
                complaints.append(
                    f"members {same} train on the same batch while they cooperate, so the clan's batch is smaller than "
                    f"configured. Pass training_data to initialize(), or use engine.clan.sampler()."
                )
            if kind == PhaseKind.COMPETITIVE.value and len(set(digests)) > 1:
                complaints.append(
                    "members train on different data while they compete, so fitness compares the data as well. "
                    "Pass training_data to initialize(), or use engine.clan.sampler()."
                )
        fresh = [complaint for complaint in dict.fromkeys(complaints) if complaint not in self._has_warned]
        self._has_warned.update(fresh)
        for complaint in fresh:
            warnings.warn(complaint, UserWarning, stacklevel=2)
        return fresh


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
