"""Stand-alone process groups: all traffic between members uses these.

``torch.distributed.new_group`` builds a group inside the default world, and a member's default world holds the member's
ranks only. Stand-alone groups are built on the bootstrap store instead. torch's collectives accept them as ``group=``.
Its point-to-point functions look ranks up in the world and do not, so the transports call the group's own methods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store, c10d_logger


def _keep_errors_visible() -> None:
    """Lets errors of collectives on stand-alone groups through torch's logger of errors.

    The logger asks for the group's backend, which torch knows for groups of its world only. It raises an error of its
    own then, which would be the last word of every rank whose peer has failed.
    """
    describe = c10d_logger._get_msg_dict

    @wraps(describe)
    def describe_any(func_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return describe(func_name, *args, **kwargs)
        except ValueError as error:
            return {"func_name": func_name, "group": str(error)}

    c10d_logger._get_msg_dict = describe_any  # type: ignore[assignment]  # Python's own wrapper of the same signature


_keep_errors_visible()


def stand_alone_group(store: Store, name: str, rank: int, size: int, *, device_type: str, timeout_s: float) -> Any:
    """A process group of ``size`` ranks that find each other under ``name`` on ``store``. All of them must call it.

    Args:
        store: the clan's bootstrap store.
        name: unique to this group and equal on its ranks. A new group may reuse the name of an old one.
        rank: this process's rank in the group, 0 to size - 1.
        size: number of ranks in the group.
        device_type: ``"cpu"`` for gloo, ``"cuda"`` for NCCL.
        timeout_s: seconds after which a collective fails.
    """
    # A second clan in the same processes uses the same names. It must not find the addresses of the first.
    attempt = store.add(f"group/{name}/attempts/{rank}", 1)
    prefixed = PrefixStore(f"group/{name}/{attempt}", store)
    timeout = timedelta(seconds=timeout_s)
    group = ProcessGroup(prefixed, rank, size)
    # Imported where used: a build of torch can lack one of the two.
    backend: Any
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
    """This rank and its peers: the ranks with the same coordinates in every member, one per member.

    Messages are numbers and JSON. Nothing that arrives over the wire is unpickled.

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
        """[members, ...] float64: the values of each member, in member order. All ranks pass the same shape."""
        mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        if self.size == 1:
            return mine.numpy()[None].copy()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.stack(parts).numpy()

    def gather_json(self, value: Any) -> list[Any]:
        """The values of each member, in member order: anything that JSON represents. Floats come back exactly."""
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

    def first_difference(
        self, items: list[Any], *, noun: str, others: Sequence[int] | None = None
    ) -> tuple[int, Any, Any] | None:
        """Compares lists over the replica group. All ranks of the clan call it with their own list.

        Args:
            items: this rank's list, of values that JSON represents.
            noun: what the items are, as in "8 parameters".
            others: by member, the member whose list it is to equal; None for member 0.

        Returns:
            None if all lists are as they are to be. Otherwise the first member whose list differs from the other
            member's, the first item of it that differs, and the other's item at the same index. If one list is a prefix
            of the other, their lengths take the place of the items.
        """
        # Digests first: lists can be long, and they are equal in every run but a broken one.
        digests = self.gather_json(hashlib.blake2b(repr(items).encode(), digest_size=16).hexdigest())
        others = others if others is not None else [0] * self.size
        differing = next((member for member, digest in enumerate(digests) if digest != digests[others[member]]), None)
        if differing is None:
            return None
        lists = self.gather_json(items)
        own, other = lists[differing], lists[others[differing]]
        lengths = (f"{len(own)} {noun}", f"{len(other)} {noun}")
        return differing, *next(((a, b) for a, b in zip(own, other, strict=False) if a != b), lengths)
