"""The order in which a rank posts the clan's collectives, compared down the column.

Collectives of one group are matched by the order in which each rank posts them, and nothing else: two layers of
one size that change places are averaged with each other, without a word, and under NCCL ranks that post in
different orders can wait for each other for ever. So the rule is that all members post the same collectives in the
same order. Autograd keeps it: it runs the hooks of one device one after the other, in an order that the graph
gives. A model whose graph differs between members (a layer that is skipped at random) breaks it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.errors import DivergenceError


class PostingOrder:
    """What this rank posted in the step that runs, as one running digest."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=7)
        self._num_posted = 0

    def note(self, what: str, tensor: torch.Tensor) -> None:
        """A collective on ``tensor`` is about to be posted."""
        self._digest.update(f"{what} {tensor.numel()} {tensor.dtype}\n".encode())
        self._num_posted += 1

    def restart(self) -> None:
        """A step is over."""
        self.__init__()

    def check(self, group: Any, device: torch.device) -> None:
        """All ranks of ``group`` posted the same in this step; a collective of theirs.

        Raises:
            DivergenceError: if they did not.
        """
        mine = int.from_bytes(self._digest.digest(), "big")
        # The greatest of both signs: equal to what is here on both sides only where all are equal.
        greatest = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=group)
        if greatest.tolist() != [mine, -mine]:
            raise DivergenceError(
                f"members averaged their gradients in different orders in one step (this rank posted "
                f"{self._num_posted} collectives), so that gradients of different layers may have been mixed. Let "
                f"every member's forward pass use the same layers in the same order."
            )
