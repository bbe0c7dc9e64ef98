"""How Megatron-core's gradients meet across members: every form of its reduction, teams, the probe, the overlap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from clantune_scale.distributed import world
from clantune_scale.distributed.world import ClanGroups
from clantune_scale.gradients.probe import GradientProbe
from tests.backends.families import Setup
from tests.backends.families import megatron as family
from tests.backends.megatron_models import build, initialize
from tests.backends.plain_gpt import CONTEXT
from tests.ranks import run_ranks

FORMS = {
    "reduced": {},
    "overlapping": {"overlap": True},
    "distributed": {"distributed": True},
    "per token": {"per_token": True},
}


def _leave(result: Any) -> Any:
    dist.barrier()
    dist.destroy_process_group()
    return result


def _enter(setup: Setup) -> tuple[world.ClanWorld, ClanGroups]:
    from tests import megatron_shim

    megatron_shim.install()
    joined = world.join(setup.members, timeout_s=60)
    initialize(setup)
    joined.arrange(pp=setup.pp, tp=setup.tp, stands=(joined.at.pp, joined.at.dp, joined.at.tp))
    return joined, ClanGroups(joined, "cpu")


def _per_token_step(data_iterator: Any, model: Any) -> Any:
    """A sum over tokens, as ``calculate_per_token_loss`` wants it; members have different numbers of tokens."""
    output, _ = family.forward_step(data_iterator, model)

    def summed(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        kept = losses[:, : CONTEXT - world.current().member]
        return kept.sum(), torch.tensor(kept.numel(), dtype=torch.int), {}

    return output, summed


def _gradients(setup: Setup, model: Any, seed: int, num_micro: int = 2) -> torch.Tensor:
    """What Megatron's schedule leaves for the optimizer on this rank, from batches of its own."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(32, (4, CONTEXT + 1), generator=generator) for _ in range(num_micro)]
    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=_per_token_step if setup.options.get("per_token") else family.forward_step,
        data_iterator=iter([[batch] for batch in batches]),
        model=[model],
        num_microbatches=num_micro,
        seq_length=CONTEXT,
        micro_batch_size=4,
        forward_only=False,
    )
    parts = [bucket.grad_data for buckets in model.bucket_groups for bucket in buckets.buckets]
    if setup.options.get("distributed"):
        parts = [part.chunk(model.dp_group.size())[model.dp_group.rank()] for part in parts]
    return torch.cat([part.reshape(-1) for part in parts]).clone()


def _shared(setup: Setup, forms: dict[str, dict], team_of: dict[int, tuple[int, ...]]) -> dict[str, dict]:
    """By form: how far the shared gradients are from the team's mean, and the cosine that the probe saw."""
    from clantune_scale.backends.megatron import MegatronBackend

    joined, groups = _enter(setup)
    found = {}
    for form, options in forms.items():
        asked = Setup(**{**vars(setup), "options": options})
        model, optimizer = build(asked)
        backend = MegatronBackend(
            model, optimizer, forward_step=family.forward_step, seq_length=CONTEXT, micro_batch_size=4, accumulation=2
        )
        team, probe = (joined.member,), GradientProbe()
        # The first batch only shows Megatron's overlapping reduction the order of gradients.
        _gradients(asked, model, 100 + joined.at.rank)
        backend.share_gradients(lambda: team, groups, probe)  # noqa: B023 (called in this round of the loop)
        own = _gradients(asked, model, joined.at.rank)
        team = team_of[joined.member]
        unseen = _gradients(asked, model, joined.at.rank)
        probe.is_active = True
        seen = _gradients(asked, model, joined.at.rank)
        parts = [torch.empty_like(own) for _ in team]
        dist.all_gather(parts, own, group=groups.replica_group(team))
        mean = torch.stack(parts).mean(0)
        backend.detach()
        team = team_of[joined.member]
        alone = _gradients(asked, model, joined.at.rank)
        sums = torch.stack([own @ mean, own @ own, mean @ mean])
        dist.all_reduce(sums)
        found[form] = {
            "off": max((seen - mean).abs().max().item(), (unseen - mean).abs().max().item()),
            "moved": (mean - own).abs().max().item(),
            "same after detaching": torch.equal(alone, own),
            "cosine": (sums[0] / (sums[1] * sums[2]).sqrt()).item(),
            "seen cosine": probe.read_alignment(torch.device("cpu")),
        }
    return _leave(found)


def _check(found: dict[str, dict]) -> None:
    for form, figures in found.items():
        # Two orders of summation in float32, of gradients of at most 1.
        assert figures["off"] < 1e-6, form
        assert figures["moved"] > 1e-3 and figures["same after detaching"], form
        assert math.isclose(figures["seen cosine"], figures["cosine"], rel_tol=1e-4), form
        assert figures["seen cosine"] < 0.99


def test_every_form_of_reduction_gives_the_clans_mean():
    setup = Setup(members=2, dp=2)
    for found in run_ranks(4, _shared, setup, FORMS, {0: (0, 1), 1: (0, 1)}, preload=family.PRELOAD):
        _check(found)


@pytest.mark.slow
def test_teams_share_among_themselves():
    setup = Setup(members=4)
    teams = {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)}
    for found in run_ranks(4, _shared, setup, FORMS, teams, preload=family.PRELOAD):
        _check(found)


def _traced() -> tuple[list[float], float]:
    """When the clan's collectives of one backward pass were posted, and when its last function began (us)."""
    from clantune_scale.backends.megatron import MegatronBackend

    setup = Setup(members=2, options={"overlap": True})
    _, groups = _enter(setup)
    model, optimizer = build(setup)
    backend = MegatronBackend(
        model, optimizer, forward_step=family.forward_step, seq_length=CONTEXT, micro_batch_size=4
    )
    backend.share_gradients(lambda: (0, 1), groups)
    _gradients(setup, model, 0, num_micro=1)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        _gradients(setup, model, 1, num_micro=1)
    events = trace.events()
    posted = [event.time_range.start for event in events if event.name.startswith("c10d::allreduce")]
    backward = [event.time_range.start for event in events if "evaluate_function" in event.name]
    return _leave((posted, max(backward)))


def test_sharing_overlaps_with_backward():
    """All but the last bucket's all-reduce over the clan is posted before backward comes to its last function."""
    for posted, last in run_ranks(2, _traced, preload=family.PRELOAD):
        assert len(posted) >= 3
        assert sum(start < last for start in posted) >= len(posted) - 1
