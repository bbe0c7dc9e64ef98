"""A round that was saved by one number of data-parallel ranks goes on with another, with the same values."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.checkpoint.reshard import saved_places
from clantune_scale.topology import Topology
from tests.backends.small_runs import ds_config, flat_weights, in_member_worlds
from tests.checkpoint.runs import leave, named, resumed, seed
from tests.ranks import run_ranks
from tests.small_clans import clan_config, start, train


def _full_moments(engine):
    """Every parameter's first moment, whole."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        state = engine.basic_optimizer.state
        found = [state[parameter]["exp_avg"] for parameter in engine.module.parameters()]
    else:
        found = [safe_get_full_optimizer_state(parameter, "exp_avg") for parameter in engine.module.parameters()]
    return torch.cat([moment.detach().float().flatten().clone() for moment in found])


def _values(rank, config, num_steps, more):
    """Weights, moments and averaged weights' sum where the run stands; it goes on for ``more`` steps."""
    seed(0)
    engine, loader = start(config)
    train(engine, loader, num_steps)
    clan = engine.clan
    step = clan.backend.param_groups()[0].get("step"), clan.state().scalars["optimizer"]["counts"][0]
    found = flat_weights(engine), _full_moments(engine), step, clan.population, engine.global_steps
    losses = train(engine, loader, num_steps + more)
    leave(clan)
    return found, losses[-1:]


CASES = [
    pytest.param(
        stage, before, after, marks=[] if (stage, before, after) in ((1, 2, 1), (3, 1, 2)) else [pytest.mark.slow]
    )
    for stage in range(4)
    for before, after in ((2, 1), (1, 2), (2, 3))
]


@pytest.mark.parametrize(("stage", "before", "after"), CASES)
def test_values_are_the_same_on_another_number_of_ranks(stage, before, after, tmp_path):
    config = clan_config(
        tmp_path, ds_config(stage), strategy="clan", total_steps=40, checkpoint={"allow": ["topology"]}
    )
    first = run_ranks(2 * before, in_member_worlds, _values, named(config, "first"), 10, 0)
    run_dir = tmp_path / "first"
    second = run_ranks(2 * after, in_member_worlds, _values, resumed(config, run_dir), 10, 4)
    for rank, (found, losses) in enumerate(second):
        weights, moments, step, population, num_steps = first[rank // after * before][0]
        assert torch.equal(found[0], weights) and torch.equal(found[1], moments)
        assert found[2:] == (step, population, num_steps) and moments.abs().max() > 0
        assert losses[0] < 100


def test_ranks_that_held_the_same_part_are_found():
    saved = {"population_size": 2, "dp": 3, "pp": 2, "tp": 2}
    at = Topology(population_size=2, dp=1, pp=2, tp=2).coordinates(7)
    assert (at.pp, at.tp) == (1, 1)
    assert [(p.dp, p.member_rank) for p in saved_places(at, saved)] == [(0, 7), (1, 9), (2, 11)]
