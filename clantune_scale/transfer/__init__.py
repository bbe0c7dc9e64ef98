"""Moving a member's training state: onto another member, or aside and back."""

from clantune_scale.transfer.state import MemberState, Snapshot
from clantune_scale.transfer.transfers import TransferReport, Transfers, average_members, transfer

__all__ = ["MemberState", "Snapshot", "TransferReport", "Transfers", "average_members", "transfer"]
