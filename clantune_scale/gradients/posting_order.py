"""The order in which a rank posts the clan's collectives, compared over the replica group.

A group matches its collectives by the order in which each rank posts them, and by nothing else. If two layers of one
size change places, their gradients are averaged with each other and no error is raised. Under NCCL, ranks that post
in different orders can deadlock. All members must therefore post the same collectives in the same order.

Autograd keeps this rule: it runs the hooks of one device one after the other, in an order that follows from the
graph. A model whose graph differs between members (a layer that is skipped at random) breaks it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.errors import DivergenceError


class PostingOrder:
    """A running digest of what this rank has posted in the current step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new step."""
        # Seven bytes, so that the digest and its negative both fit into an int64.
        self._digest = hashlib.blake2b(digest_size=7)
        self._num_posted = 0

    def note(self, what: str, tensor: torch.Tensor) -> None:
        """Records a collective on ``tensor``, just before it is posted."""
        self._digest.update(f"{what} {tensor.numel()} {tensor.dtype}\n".encode())
        self._num_posted += 1

    def check(self, group: Any, device: torch.device) -> None:
        """Checks that all ranks of ``group`` posted the same collectives in this step (a collective of the group).

        Args:
            group: the ranks that share gradients.
            device: where the group's tensors live.

        Raises:
            DivergenceError: if two ranks posted different collectives or another order.
        """
        mine = int.from_bytes(self._digest.digest(), "big")
        # One all-reduce gives the maximum and the minimum. Both equal this rank's digest only if all digests are equal.
        greatest = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=group)
        if greatest.tolist() != [mine, -mine]:
            raise DivergenceError(
                f"members averaged their gradients in different orders in one step (this rank posted "
                f"{self._num_posted} collectives). Gradients of different layers may have been mixed. Use the same "
                f"layers in the same order in every member's forward pass."
            )
