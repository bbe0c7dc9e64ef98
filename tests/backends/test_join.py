"""``clantune_scale.join``: what it takes, and what it refuses."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

import clantune_scale
from clantune_scale.config.schema import ClanConfig
from clantune_scale.distributed import world
from clantune_scale.errors import ConfigError
from tests.ranks import run_ranks


def _joined(path: str) -> Any:
    forms = ({"clantune": {"population_size": 2}}, path, ClanConfig(population_size=2), 2)
    worlds = [clantune_scale.join(form) for form in forms]
    return [one is world.current() for one in worlds], worlds[0].member, os.environ["WORLD_SIZE"]


def test_every_form_of_a_config_joins_the_same_clan(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"clantune": {"population_size": 2}}))
    assert run_ranks(2, _joined, str(path)) == [([True] * 4, 0, "1"), ([True] * 4, 1, "1")]


@pytest.mark.parametrize("config", [{}, {"clantune": {"population_size": 2, "enabled": False}}])
def test_a_config_without_a_clan_is_said(config):
    with pytest.raises(ConfigError, match="Write at least|Leave out join"):
        clantune_scale.join(config)
