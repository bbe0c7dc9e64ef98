"""Moving a member's training state: to another member, or into a snapshot and back."""

from clantune_scale.transfer.state import MemberState, Snapshot
from clantune_scale.transfer.transfers import TransferReport, Transfers, average_members, transfer

__all__ = ["MemberState", "Snapshot", "TransferReport", "Transfers", "average_members", "transfer"]
