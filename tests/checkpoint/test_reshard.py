"""A round that was saved by one number of data-parallel ranks goes on with another, with the same values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clantune_scale.checkpoint.capture import pieces_of
from clantune_scale.checkpoint.reshard import saved_places
from clantune_scale.core.strategies.clan.strategy import ClanStrategy
from clantune_scale.distributed.topology import Topology
from tests.backends.small_runs import ds_config, flat_weights, in_member_worlds
from tests.checkpoint.runs import leave, named, resumed, seed
from tests.ranks import run_ranks
from tests.small_clans import clan_config, start, train


def _stretches(clan):
    """By logical vector, (first element, values) of what this rank holds: weights, moments, averages, buffers.

    Likewise of the guard's copy, under ``kept``.
    """
    state = clan.state()
    return {
        prefix + key: (first, tensors[name].detach().float().flatten()[offset : offset + length].clone())
        for prefix, tensors in (("", dict(state.tensors)), ("kept/", dict(clan.progress.rollback_snapshot.tensors)))
        for name, pieces in pieces_of(state).items()
        for key, first, offset, length in pieces
    }


def _joined(ranks):
    """The whole vectors, from one member's ranks."""
    joined = {}
    for stretches in ranks:
        for key, (first, values) in stretches.items():
            joined.setdefault(key, {})[first] = values
    return {key: torch.cat([parts[first] for first in sorted(parts)]) for key, parts in joined.items()}


def _values(rank, config, num_steps, more):
    """What the rank holds where the run stands, the member's weights, and the loss after ``more`` steps."""
    seed(0)
    engine, loader = start(config)
    train(engine, loader, num_steps)
    clan = engine.clan
    counts = clan.state().scalars["optimizer"]["counts"][0]
    found = _stretches(clan), flat_weights(engine), (counts, clan.population, engine.global_steps)
    losses = train(engine, loader, num_steps + more)
    leave(clan)
    return found, losses[-1:]


class Unkept(ClanStrategy):
    """After the freeze nothing is a state to go back to."""

    def idle(self, population):
        return replace(super().idle(population), takes_snapshot=False)


FEW = ((3, 1, 2, 40),)
# Genes freeze after 16 of 40 steps, and after 8 of 20: what ``Unkept`` goes back to is then older than the state.
LENGTHS = {40: 10, 20: 13}
CASES = [
    pytest.param(stage, *change, marks=[] if (stage, *change) in FEW else [pytest.mark.slow])
    for stage in range(4)
    for change in ((2, 1, 20), (1, 2, 40), (2, 3, 20))
]


@pytest.mark.parametrize(("stage", "before", "after", "total"), CASES)
def test_values_are_the_same_on_another_number_of_ranks(stage, before, after, total, tmp_path):
    # Asynchronously, a round that ends while the one before is still being written is left out.
    checkpoint = {"allow": ["topology"], "asynchronous": False}
    config = clan_config(
        tmp_path, ds_config(stage), strategy=f"{__name__}:Unkept", total_steps=total, checkpoint=checkpoint
    )
    steps = LENGTHS[total]
    first = run_ranks(2 * before, in_member_worlds, _values, named(config, "first"), steps, 0)
    run_dir = tmp_path / "first"
    second = run_ranks(2 * after, in_member_worlds, _values, resumed(config, run_dir), steps, 4)
    for member in range(2):
        saved = [found for found, _ in first[member * before : (member + 1) * before]]
        loaded = [found for found, _ in second[member * after : (member + 1) * after]]
        expected, joined = (_joined([stretches for stretches, *_ in ranks]) for ranks in (saved, loaded))
        assert expected.keys() == joined.keys() and len(expected) >= 8
        live = [key for key in expected if not key.startswith("kept/")]
        is_older = any(not torch.equal(expected[key], expected[f"kept/{key}"]) for key in live)
        assert is_older is (total == 20)
        assert [key for key in expected if not torch.equal(joined[key], expected[key])] == []
        assert all(torch.equal(weights, saved[0][1]) and facts == saved[0][2] for _, weights, facts in loaded)
    assert all(losses[0] < 100 for _, losses in second)


def test_ranks_that_held_the_same_part_are_found():
    saved = {"population_size": 2, "dp": 3, "pp": 2, "tp": 2}
    at = Topology(population_size=2, dp=1, pp=2, tp=2).coordinates(7)
    assert (at.pp, at.tp) == (1, 1)
    assert [(p.dp, p.member_rank) for p in saved_places(at, saved)] == [(0, 7), (1, 9), (2, 11)]
