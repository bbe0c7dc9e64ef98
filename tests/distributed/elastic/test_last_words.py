"""When a rank ends by its own error, the last words of the ranks that waited for it name it and the error."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.config.schema import FaultsConfig
from clantune_scale.distributed import world
from clantune_scale.distributed.elastic.supervisor import logger
from clantune_scale.errors import ClanError
from tests.backends.small_runs import in_member_worlds
from tests.ranks import run_ranks


def _last_words(rank: int, failing: int) -> tuple[str, list[str]]:
    order: list[str] = []
    sys.excepthook = lambda kind, error, trace: order.append("traceback")
    joined = world.join(2, timeout_s=30, faults=FaultsConfig(min_members=None))
    dist.init_process_group("gloo")
    logger.addFilter(lambda record: order.append(record.getMessage()))
    if rank == failing:
        error: Any = ClanError("this member has had enough")
        sys.excepthook(type(error), error, None)
        # As the end of the process does.
        joined.replica_group.group = None
        return type(error).__name__, order
    try:
        dist.all_reduce(torch.zeros(1), group=joined.replica_group.group)
    except Exception as error:
        sys.excepthook(type(error), error, None)
        return type(error).__name__, order
    return "", order


def test_the_last_words_of_all_others_name_the_rank_that_failed_and_its_error():
    (waiting, words), (failed, own) = run_ranks(2, in_member_worlds, _last_words, 1)
    assert (waiting, failed) == ("RuntimeError", "ClanError")
    assert own == ["traceback"]
    traceback, last = words
    assert traceback == "traceback"
    assert last.startswith("clan: a member is lost: rank 0 of member 1 ended by ClanError: this member has had enough.")
