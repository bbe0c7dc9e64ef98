"""The order in which a rank posts the clan's collectives, compared over the replica group.

A group matches its collectives by the order in which each rank posts them, and by nothing else. If two layers of one
size change places, their gradients are averaged with each other and no error is raised. Under NCCL, ranks that post
in different orders can deadlock. All members must therefore post the same collectives in the same order.

Autograd keeps this rule: it runs the hooks of one device one after the other, in an order that follows from the
graph. A model whose graph differs between members (a layer that is skipped at random, experts that are chosen by the
data) breaks it. So all steps from one check to the next are compared, and not only the last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.errors import ClanError, DivergenceError


class PostingOrder:
    """A running digest of what this rank has posted since the last check.

    Attributes:
        num_posted: collectives in the present step.
    """

    def __init__(self) -> None:
        self._restart()
        self.num_posted = 0
        self._has_checked = False

    def _restart(self) -> None:
        # Seven bytes, so that the digest and its negative both fit into an int64.
        self._digest = hashlib.blake2b(digest_size=7)

    def end_step(self) -> None:
        """Begins a new step."""
        self.num_posted = 0

    def note(self, what: str, tensor: torch.Tensor) -> None:
        """Records a collective on ``tensor``, just before it is posted."""
        self._digest.update(f"{what} {tensor.numel()} {tensor.dtype}\n".encode())
        self.num_posted += 1

    def require_posted(self, num_steps: int) -> None:
        """Checks that this step's gradients were shared, before an update.

        Args:
            num_steps: that are done.

        Raises:
            ClanError: if nothing was posted. The other members wait for this one's gradients.
        """
        if not self.num_posted:
            raise ClanError(
                f"this member shared no gradient in optimizer step {num_steps + 1}, and the others wait for it: its "
                f"loop skipped loss.backward() of the step's last micro-batch. Take the backward pass of every "
                f"batch: a member whose loss is not finite is left out of the mean by itself (faults.nonfinite_mask). "
                f"To leave a batch out, multiply its loss by 0."
            )

    def check_step(self, group: Callable[[], Any], device: torch.device, *, num_steps: int, ends_phase: bool) -> None:
        """Compares what ranks posted: in the first step in which they share gradients, then once per phase.

        Args:
            group: gives the ranks that share gradients.
            device: where the group's tensors live.
            num_steps: that are done.
            ends_phase: whether this step is a phase's last.

        Raises:
            ClanError: if this rank has posted nothing.
            DivergenceError: if ranks posted different collectives.
        """
        self.require_posted(num_steps)
        if ends_phase or not self._has_checked:
            self._has_checked = True
            self.check(group(), device)

    def check(self, group: Any, device: torch.device) -> None:
        """Checks that all ranks of ``group`` posted the same collectives since the last check (a collective of them).

        Args:
            group: the ranks that share gradients.
            device: where the group's tensors live.

        Raises:
            DivergenceError: if two ranks posted different collectives or another order.
        """
        mine = int.from_bytes(self._digest.digest(), "big")
        self._restart()
        # One all-reduce gives the maximum and the minimum. Both equal this rank's digest only if all digests are equal.
        greatest = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=group)
        if greatest.tolist() != [mine, -mine]:
            raise DivergenceError(
                f"members averaged their gradients in different orders in a step of this phase (this rank posted "
                f"{self.num_posted} collectives in the last one). Gradients of different layers may have been mixed. "
                f"Use the same layers in the same order in every member's forward pass. DistributedDataParallel with "
                f"find_unused_parameters=True, and ZeRO 0 and 1, average layer by layer."
            )
