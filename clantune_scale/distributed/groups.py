"""Process groups that belong to no world: what crosses members goes over these.

``torch.distributed.new_group`` builds inside the default world, and a member's default world ends at the
member. These are built on the bootstrap store instead. Collectives take them as ``group=``; point-to-point
does not (torch looks its ranks up in the world), so :class:`ReplicaGroup` calls the group's own methods.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store


def stand_alone_group(store: Store, name: str, rank: int, size: int, *, device_type: str, timeout_s: float) -> Any:
    """A process group of ``size`` ranks that meet under ``name`` on ``store``; all of them must call it.

    Args:
        store: the clan's bootstrap store.
        name: of this group alone; its ranks give the same. A group may be made anew under a name it had.
        rank: this process's rank in the group, 0 to size - 1.
        size: number of ranks in the group.
        device_type: ``"cpu"`` for gloo, ``"cuda"`` for NCCL.
        timeout_s: seconds after which a collective fails.
    """
    # A second clan in the same processes meets under the same names: it must not find the first one's addresses.
    attempt = store.add(f"group/{name}/attempts/{rank}", 1)
    prefixed = PrefixStore(f"group/{name}/{attempt}", store)
    timeout = timedelta(seconds=timeout_s)
    group = ProcessGroup(prefixed, rank, size)
    if device_type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        kind, backend = ProcessGroup.BackendType.NCCL, ProcessGroupNCCL(prefixed, rank, size, options)
    else:
        from torch.distributed import ProcessGroupGloo

        kind, backend = ProcessGroup.BackendType.GLOO, ProcessGroupGloo(prefixed, rank, size, timeout)
    group._register_backend(torch.device(device_type), kind, backend)
    group._set_default_backend(kind)
    return group


class ReplicaGroup:
    """The ranks with the same place in every member, one per member: here the clan talks.

    Messages are numbers and JSON; nothing that arrives over the wire is unpickled.

    Args:
        group: a stand-alone gloo group, ranked by member.
        member: this process's member, its rank in the group.
        size: number of members.
    """

    def __init__(self, group: Any, member: int, size: int) -> None:
        self.group = group
        self.member = member
        self.size = size

    def gather(self, values: np.ndarray) -> np.ndarray:
        """[members, ...] float64: what each member gave; all give the same shape."""
        mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        if self.size == 1:
            return mine.numpy()[None].copy()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.stack(parts).numpy()

    def gather_json(self, value: Any) -> list[Any]:
        """What each member gave, in member order; anything that JSON holds (floats come back exactly)."""
        payload = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        sizes = self.gather(np.array([payload.size])).astype(int).ravel()
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: payload.size] = torch.from_numpy(payload.copy())
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        if self.size == 1:
            parts = [padded]
        else:
            dist.all_gather(parts, padded, group=self.group)
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def first_difference(self, items: list[Any], *, noun: str) -> tuple[int, Any, Any] | None:
        """Compares lists down the column; all ranks of the clan call it with their own.

        Args:
            items: this rank's list, of what JSON holds.
            noun: what they are, for "8 parameters".

        Returns:
            The first member whose list differs from member 0's, its first item that does, and member 0's in that
            place (their lengths where one list goes on after the other); None where all are equal.
        """
        digests = self.gather_json(hashlib.blake2b(repr(items).encode(), digest_size=16).hexdigest())
        other = next((member for member, digest in enumerate(digests) if digest != digests[0]), None)
        if other is None:
            return None
        lists = self.gather_json(items)
        pairs = zip(lists[other], lists[0], strict=False)
        lengths = (f"{len(lists[other])} {noun}", f"{len(lists[0])} {noun}")
        return other, *next(((a, b) for a, b in pairs if a != b), lengths)
