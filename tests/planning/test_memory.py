"""Bytes of a rank, by hand; `test_traffic.py` compares state and copies with real runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clantune_scale.planning.job import Job
from clantune_scale.planning.memory import rank_memory, state_bytes

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
    memory, plain = rank_memory(job, rolls_back=True), rank_memory(job.without_clan())
    # 440 over 2 ranks; 448, padded to a multiple of 16, over 8.
    assert (memory.moments, plain.moments) == (220 * 8, 56 * 8)
    assert memory.average == 880 and plain.average == 0
    assert memory.host == 2 * state_bytes(job) == 2 * (880 * 4) and plain.host == 0
