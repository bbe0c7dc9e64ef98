"""Where DeepSpeed reduces while backward goes on, the clan does too; and every rank posts in one order."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from clantune_scale.distributed.world import ClanGroups
from tests.backends.small_runs import batch, ds_config, in_member_worlds, member_engine
from tests.ranks import run_ranks


def _trace(rank: int, config: dict) -> list[tuple[str, Any]]:
    """What happens in one backward pass, in order: gradients, and collectives by their group's size and theirs."""
    clan, backend = member_engine(config, 2)
    groups = ClanGroups(clan, "cpu")
    backend.share_gradients(lambda: (0, 1), groups)
    engine = backend.engine
    # The first step makes the groups and, under ZeRO 3, learns the order of parameters.
    engine.backward(engine(*batch(0, 0, rank)))
    engine.step()
    events: list[tuple[str, Any]] = []
    across = {groups.gradient((0, 1)), groups.replica_group((0, 1))}
    all_reduce = dist.all_reduce

    def all_reduce_traced(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        events.append(("clan" if group in across else "member", tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    for name, parameter in engine.module.named_parameters():
        parameter.register_hook(lambda _, name=name: events.append(("gradient", name)))
    loss = engine(*batch(1, 0, rank))
    dist.all_reduce = all_reduce_traced
    try:
        engine.backward(loss)
    finally:
        dist.all_reduce = all_reduce
    return events


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_clan_reduces_before_backward_ends_and_in_one_order(stage):
    config = ds_config(stage)
    # Buckets of less than a layer, so that the last layer's are full while the first one's gradient is not known.
    config["zero_optimization"] |= {"overlap_comm": True, "reduce_bucket_size": 200}
    traces = run_ranks(4, in_member_worlds, _trace, config)
    for events in traces:
        posted = [index for index, (kind, _) in enumerate(events) if kind == "clan"]
        last_gradient = max(index for index, (kind, _) in enumerate(events) if kind == "gradient")
        assert len(posted) > 1 and posted[0] < last_gradient
        # NCCL needs one order of collectives on all ranks, whatever communicators they go over.
        assert [e for e in events if e[0] != "gradient"] == [e for e in traces[0] if e[0] != "gradient"]
