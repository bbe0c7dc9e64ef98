"""Waiting for ranks that may be slow, without waiting for ranks that have died."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clantune_scale.distributed.elastic.heartbeat import Heartbeat
from clantune_scale.distributed.elastic.quorum import resume_remedy
from clantune_scale.distributed.store import own_connection
from clantune_scale.errors import ClanError

if TYPE_CHECKING:
    from pathlib import Path

    from clantune_scale.distributed.world import ClanWorld

_POLL_S = 0.1


@contextmanager
def wait_while_ranks_live(
    world: ClanWorld, *, silence_s: float, run_dir: Path | None
) -> Iterator[Callable[[str], None]]:
    """Keeps a heartbeat between all ranks while some of them wait for another. All ranks of the clan enter.

    If members may die, the supervisor keeps a heartbeat already, and restarts a rank that waits for a dead one.

    Args:
        world: the clan's.
        silence_s: seconds without a heartbeat after which a rank counts as dead.
        run_dir: the run's folder, for the message about a resume; None if there is none.

    Yields:
        ``wait(key)``: waits until the key is in the clan's store. It raises ClanError if a rank has died.
    """
    failures: list[str] = []
    heartbeat = None
    if not world.may_lose_members and world.topology.world_size > 1:
        heartbeat = Heartbeat(
            own_connection(world.store),
            rank=world.at.rank,
            size=world.topology.world_size,
            name=lambda rank: (
                f"rank {rank % world.topology.member_size} of member {rank // world.topology.member_size}"
            ),
            silence_s=silence_s,
            on_failure=failures.append,
        )

    def wait(key: str) -> None:
        while not world.store.check([key]):
            if failures:
                remedy = resume_remedy(None if run_dir is None else str(run_dir))
                raise ClanError(f"{failures[0]}, while the others waited for it. {remedy}")
            time.sleep(_POLL_S)

    try:
        yield wait
    finally:
        if heartbeat is not None:
            heartbeat.stop()
