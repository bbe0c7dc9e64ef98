"""A clone, rank to rank down the column, straight into live tensors.

Several clones of one donor form a chain: each passes a bucket on before it unpacks it, so that the donor
sends once however many receive. A rank needs room for one bucket beside its state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clantune_scale.errors import DivergenceError, TransferError
from clantune_scale.groups import Column
from clantune_scale.transfer.state import MemberState, bytes_digest

BUCKET_BYTES = 1 << 25
_TAG = 71


@dataclass(frozen=True)
class TransferReport:
    """What a transfer moved.

    Attributes:
        received_bytes: by this rank.
        seconds: wall-clock time on this rank, the refresh included.
    """

    received_bytes: int
    seconds: float


def chain_of(member: int, donors: Sequence[int]) -> list[int]:
    """The members that one donor's state passes through, donor first; ``[member]`` alone where none moves."""
    donor = donors[member]
    return [donor] + [m for m, source in enumerate(donors) if source == donor and m != donor]


@torch.no_grad()
def transfer(
    state: MemberState,
    donors: Sequence[int],
    column: Column,
    group_for: Callable[[str], Any],
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> TransferReport:
    """Gives every member ``m`` the training state of ``donors[m]``. All ranks of the clan call it.

    Args:
        state: this rank's live state; written in place where this member receives.
        donors: by member; a donor keeps its own (``donors[donors[m]] == donors[m]``).
        column: this rank's control column.
        group_for: device type to the stand-alone group of the column on that device.
        bucket_bytes: size of a message.

    Raises:
        DivergenceError: if members ask for different transfers, or their states are laid out differently.
        TransferError: if what arrived is not what was sent.
    """
    start = time.perf_counter()
    chain = chain_of(column.member, donors)
    _agree(state, donors, column)
    digests = _pass_along(state, chain, column.member, group_for, bucket_bytes) if len(chain) > 1 else []
    sent = column.gather_json(
        {"digests": digests, "scalars": state.scalars if donors[column.member] == column.member else None}
    )
    for member, donor in enumerate(donors):
        wrong = [i for i, d in enumerate(sent[donor]["digests"]) if sent[member]["digests"][i : i + 1] != [d]]
        if member != donor and wrong:
            raise TransferError(
                f"member {member} received other bytes than member {donor} sent: buckets {wrong[:8]} of "
                f"{len(sent[donor]['digests'])} differ. Member {member}'s state is torn; restart from the last "
                f"committed state and look at the memory and links of its hosts."
            )
    donor = donors[column.member]
    if donor == column.member:
        return TransferReport(0, time.perf_counter() - start)
    state.load_scalars(sent[donor]["scalars"])
    state.refresh()
    return TransferReport(state.num_bytes, time.perf_counter() - start)


def _agree(state: MemberState, donors: Sequence[int], column: Column) -> None:
    """Before a byte moves: the same plan and the same layout everywhere in the column."""
    plans = column.gather_json(list(donors))
    if plans.count(plans[0]) != len(plans):
        raise DivergenceError(
            f"members ask for different transfers: {plans}, by member. This is a bug: please report it."
        )
    difference = column.first_difference(state.manifest(), noun="tensors")
    if difference is not None:
        other, theirs, ours = difference
        raise DivergenceError(
            f"member {other}'s state is laid out differently from member 0's: {theirs} against {ours}. "
            f"Give all members the same model, optimizer and ZeRO settings, and freeze the same parameters."
        )


def _pass_along(
    state: MemberState, chain: list[int], member: int, group_for: Callable[[str], Any], bucket_bytes: int
) -> list[list[int]]:
    """Receives each bucket from the one before in the chain, passes it on, unpacks it; returns their digests."""
    place = chain.index(member)
    digests = []
    for pieces in state.pieces(bucket_bytes):
        group = group_for(pieces[0].device.type)
        if place == 0:
            buffer = torch.cat(pieces)
        else:
            buffer = torch.empty(sum(p.numel() for p in pieces), dtype=torch.uint8, device=pieces[0].device)
            group.recv([buffer], chain[place - 1], _TAG).wait()
        if place + 1 < len(chain):
            group.send([buffer], chain[place + 1], _TAG).wait()
        if place > 0:
            for piece, received in zip(pieces, buffer.split([p.numel() for p in pieces]), strict=True):
                piece.copy_(received)
        digests.append(bytes_digest(buffer))
    return digests
