"""A clan that could not go on is refused before it starts."""

from __future__ import annotations

import pytest

from clantune_scale.config.deepspeed_file import parse_block
from clantune_scale.errors import ConfigError


def test_more_members_are_not_left_than_there_are():
    with pytest.raises(ConfigError, match="clantune.faults is.*min_members should be at most population_size, 2"):
        parse_block({"population_size": 2, "faults": {"min_members": 3}})


def test_survivors_need_rounds_on_disk():
    with pytest.raises(ConfigError, match="min_members needs rounds on disk.*checkpoint.every_rounds"):
        parse_block({"population_size": 2, "faults": {"min_members": 1}, "checkpoint": {"every_rounds": None}})


def test_otherwise_not():
    block = parse_block({"population_size": 2, "faults": {"min_members": 2}})
    assert (block.faults.deadline_s, block.faults.rejoin_s) == (300, 60)
    assert parse_block({"population_size": 2}).faults.min_members is None
