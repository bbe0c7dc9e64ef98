"""Gradient sharing against plain DeepSpeed on all ranks."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.distributed.world import ClanGroups
from tests.backends.small_runs import (
    SGD,
    ds_config,
    flat_weights,
    in_member_worlds,
    member_engine,
    plain_engine,
    train_step,
)
from tests.ranks import run_ranks

STEPS = 4


def _flat(rank, config):
    engine = plain_engine(config)
    losses = [train_step(engine, step, rank) for step in range(STEPS)]
    return flat_weights(engine), losses


def _clan(rank, config, population_size, is_sharing):
    clan, backend = member_engine(config, population_size)
    team = tuple(range(population_size)) if is_sharing else (clan.member,)
    backend.share_gradients(lambda: team, ClanGroups(clan, "cpu"))
    losses = [train_step(backend.engine, step, rank) for step in range(STEPS)]
    return flat_weights(backend.engine), losses


# Two summation orders of float32 gradients; AdamW's division turns 1e-8 in a gradient into up to 1e-7 here.
FP32 = 1e-6


# A stage that all-reduces its buckets, and the one that does not.
STAGES = [1, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2))]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sharing_equals_flat_data_parallelism(stage):
    config = ds_config(stage, accumulation=3, clip=0.5)
    flat = run_ranks(4, in_member_worlds, _flat, config)
    clan = run_ranks(4, in_member_worlds, _clan, config, 2, True)
    for (expected, flat_losses), (weights, losses) in zip(flat, clan, strict=True):
        assert (weights - expected).abs().max() < FP32
        assert losses == pytest.approx(flat_losses, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_sharing_in_bf16_differs_by_roundings_alone(stage):
    # With SGD a rounding stays a rounding: bf16 has 8 bits, weights move by about 0.05 in 4 steps, and two
    # orders of summation may differ in the last bit of each gradient.
    config = ds_config(stage, dtype="bf16", accumulation=2, clip=0.5, optimizer=SGD)
    flat = run_ranks(4, in_member_worlds, _flat, config)
    clan = run_ranks(4, in_member_worlds, _clan, config, 2, True)
    for (expected, _), (weights, _) in zip(flat, clan, strict=True):
        assert (weights - expected).abs().max() < 1e-3


def test_sharing_without_reduce_scatter_takes_the_contiguous_path():
    config = ds_config(2, accumulation=2, clip=0.5)
    config["zero_optimization"]["reduce_scatter"] = False
    flat = run_ranks(4, in_member_worlds, _flat, config)
    clan = run_ranks(4, in_member_worlds, _clan, config, 2, True)
    assert (clan[0][0] - flat[0][0]).abs().max() < FP32


def test_sharing_with_bf16_weights_and_fp32_accumulation():
    config = ds_config(
        1, dtype="bf16", accumulation=2, clip=0.5, optimizer=SGD, data_types={"grad_accum_dtype": "fp32"}
    )
    flat = run_ranks(4, in_member_worlds, _flat, config)
    clan = run_ranks(4, in_member_worlds, _clan, config, 2, True)
    assert (clan[0][0] - flat[0][0]).abs().max() < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_competing_equals_independent_runs_to_the_last_bit(stage):
    config = ds_config(stage, accumulation=2, clip=0.5)
    clan = run_ranks(4, in_member_worlds, _clan, config, 2, False)
    for member in range(2):
        alone = run_ranks(2, in_member_worlds, _alone, config, member)
        for rank in range(2):
            assert torch.equal(clan[2 * member + rank][0], alone[rank][0])
            assert clan[2 * member + rank][1] == alone[rank][1]
    assert not torch.equal(clan[0][0], clan[2][0])


def _teams(rank, config, teams):
    clan, backend = member_engine(config, len(teams))
    team = tuple(member for member, t in enumerate(teams) if t == teams[clan.member])
    backend.share_gradients(lambda: team, ClanGroups(clan, "cpu"))
    for step in range(STEPS):
        train_step(backend.engine, step, rank)
    return flat_weights(backend.engine)


@pytest.mark.parametrize("stage", STAGES)
def test_a_team_is_data_parallelism_over_its_members_alone(stage):
    config = ds_config(stage, accumulation=2, clip=0.5)
    teams = run_ranks(4, in_member_worlds, _teams, config, (0, 1, 1, 0))
    for members in ((0, 3), (1, 2)):
        flat = run_ranks(2, in_member_worlds, _flat_as, config, members)
        for member in members:
            assert (teams[member] - flat[0]).abs().max() < FP32
    assert (teams[0] - teams[1]).abs().max() > 1e-3


def _flat_as(rank, config, members):
    return _flat(members[rank], config)[0]


def _alone(rank, config, member):
    return _flat(2 * member + rank, config)
