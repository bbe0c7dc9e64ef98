from __future__ import annotations

import json

import pytest

from clantune_scale.errors import ConfigError
from clantune_scale.planning.hardware import PRESETS, read_hardware

OWN = {
    "compute_flops_s": 1e12,
    "memory_bytes": 16e9,
    "node_bytes_s": 10e9,
    "network_bytes_s": 1e9,
    "host_bytes_s": 12e9,
    "devices_per_node": 2,
}


def test_presets_say_that_they_are_nominal():
    assert all("nominal" in preset.source and "not measured" in preset.source for preset in PRESETS.values())


def test_links_are_the_networks_where_ranks_are_on_several_nodes():
    hardware = read_hardware(json.dumps(OWN))
    share = hardware.link_share
    assert hardware.bytes_s([0, 1]) == 10e9 * share
    assert hardware.bytes_s([0, 2, 4]) == 1e9 * share
    assert hardware.bytes_s([0, 1, 2, 3]) == 2e9 * share  # two rings, one over each device's own link


def test_json_may_be_a_file_and_start_from_a_preset(tmp_path):
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"like": "h100", "network_bytes_s": 25e9}))
    hardware = read_hardware(str(path))
    assert (hardware.network_bytes_s, hardware.memory_bytes) == (25e9, PRESETS["h100"].memory_bytes)
    assert "your own figures" in hardware.source


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("h10", r"there is no hardware 'h10'. Did you mean 'h100'"),
        ('{"like": "h999"}', "is 'h999', which is no preset"),
        ('{"memory": 1}', "hardware has no 'memory'. Did you mean 'memory_bytes'"),
        ('{"like": "h100", "memory_bytes": -1}', "memory_bytes is -1. Give a positive number"),
        ('{"memory_bytes": 1}', "the hardware lacks compute_flops_s"),
        ("{", "the hardware is not JSON"),
    ],
)
def test_what_is_no_hardware_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        read_hardware(given)
