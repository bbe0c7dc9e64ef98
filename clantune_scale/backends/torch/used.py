"""Parameters that some members use in a step and others do not, under DDP with ``find_unused_parameters``.

DDP leaves the gradient of a parameter as it is if no rank of its world has used the parameter, and its world is the
member. So a member would not take the clan's gradient of a layer that only others used. Here the clan says which
parameters any member has used, by one all-reduce of one byte per parameter after each backward pass, and the others
take the mean over the clan, as they would in plain data parallelism over all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel


class UsedInClan:
    """Gives each member the gradients of parameters that only other members used.

    Args:
        ddp: the member's.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ddp
        # In the order of DDP's own map of used parameters.
        named = [(n, p) for n, p in ddp.module.named_parameters() if p.requires_grad]
        trained = [parameter for name, parameter in named if name not in ddp.parameters_to_ignore]
        self._places = {id(parameter): place for place, parameter in enumerate(trained)}
        self._averaged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._group: Any = None

    def places(self, bucket: dist.GradBucket) -> list[int]:
        """The numbers of a bucket's parameters, the same on all ranks."""
        return [self._places.get(id(parameter), -1) for parameter in bucket.parameters()]

    def note(self, bucket: dist.GradBucket, group: Any) -> None:
        """Sees a bucket that is averaged in place over ``group``, inside the backward pass."""
        if not self._ddp.find_unused_parameters or self._ddp.static_graph:
            return
        self._group = group
        if not self._averaged:
            # Autograd runs callbacks at the end of backward. DDP's own, which waits for the buckets, may be queued
            # after this one. So this one queues another, which is the last.
            engine = Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._adopt))
        self._averaged += zip(bucket.parameters(), bucket.gradients(), strict=True)

    @torch.no_grad()
    def _adopt(self) -> None:
        averaged, self._averaged = self._averaged, []
        in_member = self._ddp.reducer._get_local_used_map() > 0
        in_clan = in_member.to(torch.uint8)
        dist.all_reduce(in_clan, op=dist.ReduceOp.MAX, group=self._group)
        is_missing = ((in_clan > 0) & ~in_member).tolist()
        for parameter, mean in averaged:
            if not is_missing[self._places[id(parameter)]]:
                continue
            if parameter.grad is not None:
                parameter.grad.copy_(mean)
            else:
                parameter.grad = mean if self._ddp.gradient_as_bucket_view else mean.clone()
