"""Bytes of a rank, by hand; `test_traffic.py` compares state and copies with real runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clantune_scale.config.batch import BatchPlan
from clantune_scale.planning.job import Job
from clantune_scale.planning.memory import Copies, rank_memory, state_bytes

JOB = Job((400, 40), (440,), 0, 1, 4, 2, 4, 2, 1, 1, False, False, 8, 1, persistence=100)


@pytest.mark.parametrize(
    ("stage", "width", "expected"),
    [
        # weights, gradients, masters, moments of 440 parameters, sharded over 2 ranks
        (0, 4, (1760, 1760, 0, 3520)),
        (0, 2, (880, 880, 1760, 3520)),
        (1, 4, (1760, 1760, 880, 1760)),
        (2, 2, (880, 440, 880, 1760)),
        (3, 2, (440 + 80, 440, 880, 1760)),  # a parameter of 40 stays whole beside its shard
    ],
)
def test_shards_of_each_stage(stage, width, expected):
    memory = rank_memory(replace(JOB, stage=stage, width=width))
    assert (memory.weights, memory.gradients, memory.masters, memory.moments) == expected
    assert memory.device == sum(expected)


def test_the_clan_shards_over_a_member_and_keeps_an_average_and_copies():
    job = replace(JOB, uses_ema=True, guards=True)
    memory, plain = rank_memory(job, Copies(states=1)), rank_memory(job.without_clan())
    # 440 over 2 ranks; 448, padded to a multiple of 16, over 8.
    assert (memory.moments, plain.moments) == (220 * 8, 56 * 8)
    assert memory.average == 880 and plain.average == 0
    assert memory.host == 2 * state_bytes(job) == 2 * (880 * 4) and plain.host == 0
    assert memory.line == memory.centre == 0


def test_members_on_the_line_shard_as_plain_zero_and_store_arrays_of_a_round():
    job = replace(JOB.without_clan(), uses_ema=True, guards=True, points=4)
    memory, plain = rank_memory(job, Copies(states=2, arrays=2, centre=1)), rank_memory(job.without_clan())
    shard = 56 * 4  # 448 over 8 ranks
    assert (memory.masters, memory.moments) == (plain.masters, plain.moments) == (shard, 2 * shard)
    assert (memory.average, memory.line, memory.centre) == (shard, 2 * shard, shard)
    assert memory.device - plain.device == 3 * shard
    # Gradients of 440 are gone at a round's end, and the centre's copy is there.
    assert memory.round_end == memory.peak - 440 * 4 + shard and memory.peak == memory.device
    state = 4 * shard  # masters, two moments, the average
    assert memory.host == 3 * state and state_bytes(job) == state


def test_arrays_on_the_host_take_turns_there_with_the_states_of_a_trial():
    job = replace(JOB.without_clan(), uses_ema=True, guards=True, points=4, host_average_every=1)
    shard = 56 * 4
    stored = rank_memory(job, Copies(host_arrays=3))
    # A rollback snapshot of four, the average, and the round's own.
    assert (stored.average, stored.line, stored.centre, stored.host) == (0, 0, 0, (4 + 1 + 3) * shard)
    assert rank_memory(job, Copies(states=2, host_arrays=3)).host == (4 + 1 + 2 * 4) * shard
    assert stored.device == rank_memory(job.without_clan()).device


def test_without_gradients_to_free_a_rounds_end_is_the_peak():
    job = replace(JOB.without_clan(), stage=2, width=2, uses_ema=True, points=4)
    memory = rank_memory(job, Copies(arrays=2, centre=1))
    assert memory.gradients == 56 * 2 and memory.centre == 56 * 4
    assert memory.peak == memory.round_end == memory.device + 56 * 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicas_are_groups_without_a_clan(stage):
    batch = BatchPlan.of_members(4, micro_batch=1, accumulation=1, dp_size=2)
    clan = replace(JOB, stage=stage, uses_ema=True, guards=True)
    memory = rank_memory(clan.replicated(4, batch))
    assert memory == rank_memory(replace(JOB, stage=stage))
    assert memory.average == memory.host == 0
