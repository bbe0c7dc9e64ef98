"""Clones and averages of members: agree on the plan, move the state, and verify it on both ends.

A recipient's state is inconsistent from the first byte until the digests of both ends are equal and its scalars are
loaded. A mark says so, and it survives every exception. While it is set, nobody trains on the state, saves it or
clones it. A new process then resumes from the last committed round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from clantune_scale.config.schema import TransferConfig
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.errors import TransferError
from clantune_scale.transfer.peer import BUCKET_BYTES, PeerTransport, messages
from clantune_scale.transfer.route import Route, agree, donors_of_retry
from clantune_scale.transfer.state import MemberState, bytes_digest
from clantune_scale.transfer.transport import Transport

if TYPE_CHECKING:
    from clantune_scale.distributed.world import ClanGroups, ClanWorld


@dataclass(frozen=True)
class TransferReport:
    """The cost of one transfer.

    Attributes:
        received_bytes: by this rank.
        seconds: wall-clock time on this rank, with the refresh.
        num_retries: members that needed a second attempt, as far as this rank's replica group knows.
    """

    received_bytes: int
    seconds: float
    num_retries: int = 0


class Transfers:
    """All transfers of a clan on one rank, and the mark of an inconsistent state.

    Args:
        replica_group: this rank and its peers, for control messages.
        group_for: maps a device type to the stand-alone group of these ranks on that device.
        transport: moves the bytes; None for peer to peer.
        inside: makes the control group of this member's own ranks; None if a member is one rank.
        ranks: by member, the launcher's rank of this rank's peer; None for the member's number.
        place: this rank's coordinates in its member.
        bucket_bytes: granularity of the comparison.
    """

    def __init__(
        self,
        replica_group: ReplicaGroup,
        group_for: Callable[[str], Any],
        *,
        transport: Transport | None = None,
        inside: Callable[[], ReplicaGroup] | None = None,
        ranks: Sequence[int] | None = None,
        place: str = "",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.transport = transport or PeerTransport(bucket_bytes=bucket_bytes)
        self._replica_group, self._group_for, self._inside = replica_group, group_for, inside
        self._ranks = list(ranks if ranks is not None else range(replica_group.size))
        self._place, self._bucket_bytes = place, bucket_bytes
        self._inconsistent: str | None = None

    @classmethod
    def of(cls, world: ClanWorld, groups: ClanGroups, config: TransferConfig, *, runs: Path) -> Transfers:
        """The transfers of a clan.

        Args:
            world: this process's place in the clan.
            groups: the stand-alone groups that carry tensors.
            config: the block's ``transfer`` section.
            runs: the folder of runs.
        """
        at, topology = world.at, world.topology
        size = topology.member_size
        return cls(
            world.replica_group,
            groups.replica_group_for,
            transport=_transport_of(config, runs),
            inside=(lambda: ReplicaGroup(groups.member(), at.member_rank, size)) if size > 1 else None,
            ranks=topology.replica_group_ranks(at.rank),
            place=f"pp{at.pp}.dp{at.dp}.tp{at.tp}",
            bucket_bytes=config.bucket_bytes,
        )

    @property
    def is_inconsistent(self) -> bool:
        """Whether this rank's live state is partly another member's."""
        return self._inconsistent is not None

    def require_consistent(self) -> None:
        """Checks the mark. Every reader of a live state calls it first.

        Raises:
            TransferError: if the state is inconsistent.
        """
        if self._inconsistent is not None:
            raise TransferError(f"{self._inconsistent}, and no later transfer repaired it. {_REMEDY}")

    @torch.no_grad()
    def run(self, state: MemberState, donors: Sequence[int], *, round_index: int | None = None) -> TransferReport:
        """Gives every member ``m`` the training state of ``donors[m]``. All ranks of the clan call it.

        Args:
            state: this rank's live state, written in place if this member receives.
            donors: by member. A donor keeps its own state (``donors[donors[m]] == donors[m]``).
            round_index: the round that ends, for messages.

        Raises:
            DivergenceError: if members ask for different transfers, or their states are laid out differently.
            TransferError: on all ranks, if what arrived differs from what was sent in both attempts.
        """
        start = time.perf_counter()
        self.require_consistent()
        state = agree(state, donors, self._replica_group)
        if all(member == donor for member, donor in enumerate(donors)):
            return TransferReport(0, time.perf_counter() - start)
        member, donor = self._replica_group.member, donors[self._replica_group.member]
        when = f"round {round_index}: " if round_index is not None else ""
        # Set before the first byte arrives, and cleared only after both digests and the scalars are in place.
        if member != donor:
            self._inconsistent = (
                f"{when}member {member} (rank {self._ranks[member]}) was receiving member {donor}'s state"
            )
        scalars, first, failed = self._move(state, donors)
        inconsistent = self._gather_failures(failed)
        if member != donor and member not in inconsistent:
            state.load_scalars(scalars[donor])
            state.refresh()
            self._inconsistent = None
        if inconsistent:
            raise _error(when, inconsistent, donors)
        received = state.num_bytes if member != donor else 0
        return TransferReport(received, time.perf_counter() - start, num_retries=len(first))

    @torch.no_grad()
    def average(self, state: MemberState, weights: Sequence[float], *, round_index: int | None = None) -> None:
        """Makes every member's weights the clan's weighted mean, and verifies that all members hold the same mean.

        Args:
            state: this rank's live state; see :func:`clantune_scale.transfer.average_members`.
            weights: by member, summing to 1.
            round_index: the round that ends, for messages.

        Raises:
            TransferError: on all ranks, if members do not hold the same mean.
        """
        self.require_consistent()
        average_members(state, weights, self._replica_group, self._group_for)
        digests = [bytes_digest(tensor.reshape(-1).view(torch.uint8)) for tensor in averaged(state) if tensor.numel()]
        said = self._replica_group.gather_json(digests)
        # Nobody knows which mean is right, so the message names the members that differ from the majority.
        usual = max(said, key=said.count)
        failed = {member: "its mean differs from the others'" for member, one in enumerate(said) if one != usual}
        inconsistent = self._gather_failures(failed)
        if inconsistent:
            when = f"round {round_index}: " if round_index is not None else ""
            self._inconsistent = f"{when}members {sorted(inconsistent)} did not get the clan's mean"
            raise TransferError(f"{self._inconsistent}: {sorted(inconsistent.values())}. {_REMEDY}")

    def _move(
        self, state: MemberState, donors: Sequence[int]
    ) -> tuple[list[Any], Mapping[int, str], Mapping[int, str]]:
        """Moves the state, with a second attempt for the members whose first one failed.

        Returns:
            By member its scalars; by member what was wrong with the first attempt; the same of the second attempt. The
            last two cover this rank's replica group and only members that failed.
        """
        said, first = self._attempt(state, donors)
        scalars = [one["scalars"] for one in said]
        failed: Mapping[int, str] = {}
        if first:
            _, failed = self._attempt(state, donors_of_retry(donors, first))
        return scalars, first, failed

    def _attempt(self, state: MemberState, donors: Sequence[int]) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """One attempt: moves the state and compares both ends.

        Returns:
            By member its report (complaint, digests, scalars), and by failed member what was wrong.
        """
        route = Route(donors, self._replica_group, self._group_for, self._place)
        complaint = self.transport.move(state, route)
        digests = self._digests(state) if len(route.chain) > 1 else []
        scalars = state.scalars if donors[self._replica_group.member] == self._replica_group.member else None
        said = self._replica_group.gather_json({"complaint": complaint, "digests": digests, "scalars": scalars})
        failed = {}
        for member, donor in enumerate(donors):
            if member != donor and (wrong := _difference(said[donor], said[member])) is not None:
                failed[member] = wrong
        return said, failed

    def _digests(self, state: MemberState) -> list[list[int]]:
        """Digests of the live tensors, read back. They cover the unpacking too and not just the network."""
        return [
            bytes_digest(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
            for pieces in messages(state, self._bucket_bytes)
        ]

    def _gather_failures(self, failed: Mapping[int, str]) -> dict[int, tuple[int, str]]:
        """(rank, what was wrong) by inconsistent member, equal on all ranks of the clan.

        One inconsistent shard makes its whole member inconsistent, so the ranks of each member share what they know.

        Args:
            failed: by member, what this rank's replica group found wrong.
        """
        mine = [(member, self._ranks[member], wrong) for member, wrong in failed.items()]
        everyone: list[list[tuple[int, int, str]]]
        everyone = self._inside().gather_json(mine) if self._inside is not None else [mine]
        inconsistent: dict[int, tuple[int, str]] = {}
        for member, rank, wrong in (entry for said in everyone for entry in said):
            inconsistent.setdefault(member, (rank, wrong))
        return inconsistent


def transfer(
    state: MemberState,
    donors: Sequence[int],
    replica_group: ReplicaGroup,
    group_for: Callable[[str], Any],
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> TransferReport:
    """One peer-to-peer transfer outside a clan.

    Args:
        state: this rank's live state.
        donors: by member, as for :meth:`Transfers.run`.
        replica_group: this rank and its peers, for control messages.
        group_for: maps a device type to the stand-alone group of these ranks on that device.
        bucket_bytes: most bytes in one message.
    """
    return Transfers(replica_group, group_for, bucket_bytes=bucket_bytes).run(state, donors)


def averaged(state: MemberState) -> list[torch.Tensor]:
    """The tensors that all members share after :func:`average_members`: masters and averaged weights."""
    return [tensor for name, tensor in state.tensors if name.startswith(("master.", "average."))]


@torch.no_grad()
def average_members(
    state: MemberState, weights: Sequence[float], replica_group: ReplicaGroup, group_for: Callable[[str], Any]
) -> None:
    """Replaces every member's fp32 weights, and its averaged weights if it keeps them, with the clan's weighted mean.

    This is HDET's converge stage. Each shard is averaged over its replica group, so ranks with different shards never
    mix. Every member keeps its own optimizer state. All ranks of the clan call it.

    Args:
        state: this rank's live state.
        weights: by member, summing to 1. A member of weight 0 may hold values that are not finite.
        replica_group: this rank and its peers.
        group_for: maps a device type to the stand-alone group of these ranks on that device.
    """
    weight = weights[replica_group.member]
    for tensor in averaged(state):
        # Zeroed and not multiplied: zero times NaN is NaN.
        if weight:
            tensor.mul_(weight)
        else:
            tensor.zero_()
        if replica_group.size > 1:
            dist.all_reduce(tensor, group=group_for(tensor.device.type))
    state.refresh()


_REMEDY = "Resume the run from its last committed round, and check the memory, links and disks of that member's hosts."


def _difference(sent: Mapping[str, Any], received: Mapping[str, Any]) -> str | None:
    """What is wrong with what a member received, or None."""
    for complaint in (sent["complaint"], received["complaint"]):
        if complaint is not None:
            return complaint
    ours, theirs = sent["digests"], received["digests"]
    wrong = [index for index, digest in enumerate(ours) if theirs[index : index + 1] != [digest]]
    if not wrong and len(ours) == len(theirs):
        return None
    return f"buckets {wrong[:8]} of {len(ours)} differ from what was sent"


def _error(when: str, inconsistent: Mapping[int, tuple[int, str]], donors: Sequence[int]) -> TransferError:
    parts = [
        f"member {member} (rank {rank}) did not get member {donors[member]}'s state in two attempts ({wrong})"
        for member, (rank, wrong) in sorted(inconsistent.items())
    ]
    error = TransferError(f"{when}{'; '.join(parts)}. Its state is inconsistent. {_REMEDY}")
    error.members = tuple(sorted(inconsistent))
    return error


def _transport_of(config: TransferConfig, runs: Path) -> Transport:
    """The transport that a config names; files are exchanged under ``runs`` if the config names no folder."""
    # Torch's checkpoint package takes a second to import, so it is imported only for a transport that uses it.
    if config.transport == "dcp_files":
        from clantune_scale.transfer.dcp_files import DcpFilesTransport

        return DcpFilesTransport(Path(config.directory) if config.directory is not None else runs / "transfers")
    return PeerTransport(bucket_bytes=config.bucket_bytes)
