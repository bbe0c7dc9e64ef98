"""Moving a member's training state: onto another member, or aside and back."""

from clantune_scale.transfer.mixing import average_members
from clantune_scale.transfer.peer import TransferReport, transfer
from clantune_scale.transfer.state import MemberState, Snapshot

__all__ = ["MemberState", "Snapshot", "TransferReport", "average_members", "transfer"]
