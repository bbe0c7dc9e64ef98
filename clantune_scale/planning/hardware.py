"""Hardware for a plan: presets from the vendors' figures, and your own in JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from clantune_scale.core.spelling import did_you_mean
from clantune_scale.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One device and its links, one direction each.

    Attributes:
        compute_flops_s: dense 16-bit floating-point operations per second, as the vendor states the peak.
        memory_bytes: of a device.
        node_bytes_s: between two devices of a node.
        network_bytes_s: of one device's share of the network between nodes.
        host_bytes_s: between a device and its host's memory.
        devices_per_node: devices between which ``node_bytes_s`` holds.
        compute_share: share of ``compute_flops_s`` that training reaches; an assumption unless you measured it.
        link_share: share of the links' rates that collectives reach; an assumption unless you measured it.
        source: of the figures.
    """

    compute_flops_s: float
    memory_bytes: float
    node_bytes_s: float
    network_bytes_s: float
    host_bytes_s: float
    devices_per_node: int = 8
    compute_share: float = 0.4
    link_share: float = 0.8
    source: str = "your own figures"

    def bytes_s(self, ranks: Sequence[int]) -> float:
        """What one rank of a ring over ``ranks`` can pass on in a second.

        Between nodes, collective libraries lay as many rings as the group has devices on a node, each over its
        own device's share of the network.
        """
        num_on_first = sum(rank // self.devices_per_node == ranks[0] // self.devices_per_node for rank in ranks)
        between = math.inf if num_on_first == len(ranks) else self.network_bytes_s * num_on_first
        return min(self.node_bytes_s, between) * self.link_share


_NOMINAL = "vendor's nominal figures, not measured"
#: Presets. Compute is dense bf16; links are one direction: NVLink's half, one InfiniBand port per device, PCIe x16.
PRESETS: dict[str, Hardware] = {
    "a100-80gb": Hardware(312e12, 80e9, 300e9, 25e9, 32e9, source=f"A100 SXM 80 GB, HDR: {_NOMINAL}"),
    "h100": Hardware(989e12, 80e9, 450e9, 50e9, 64e9, source=f"H100 SXM, NDR: {_NOMINAL}"),
    "h200": Hardware(989e12, 141e9, 450e9, 50e9, 64e9, source=f"H200 SXM, NDR: {_NOMINAL}"),
    "b200": Hardware(2250e12, 180e9, 900e9, 50e9, 64e9, source=f"B200 SXM, NDR: {_NOMINAL}"),
}
_REQUIRED = ("compute_flops_s", "memory_bytes", "node_bytes_s", "network_bytes_s", "host_bytes_s")


def read_hardware(given: str) -> Hardware:
    """A preset by its name, or your own hardware as JSON (the text, or the path of a file).

    JSON may start from a preset: ``{"like": "h100", "network_bytes_s": 25e9}``.

    Raises:
        ConfigError: for an unknown name, an unknown or missing key, or a value that is not a positive number.
    """
    if given in PRESETS:
        return PRESETS[given]
    text = given
    if os.path.isfile(given):
        with open(given, encoding="utf-8") as file:
            text = file.read()
    elif not given.lstrip().startswith("{"):
        raise ConfigError(
            f"there is no hardware {given!r}.{did_you_mean(given, PRESETS)} "
            f"Choose from {', '.join(PRESETS)}, or give JSON with {', '.join(_REQUIRED)}."
        )
    try:
        return _from_plain(json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"the hardware is not JSON: {error}. Mend it there.") from error


def _from_plain(plain: Any) -> Hardware:
    if not isinstance(plain, dict):
        raise ConfigError(f"the hardware is a {type(plain).__name__}, not an object. Put it in {{ }}.")
    like = plain.pop("like", None)
    if like is not None and like not in PRESETS:
        raise ConfigError(f'the hardware\'s "like" is {like!r}, which is no preset.{did_you_mean(str(like), PRESETS)}')
    base = {**asdict(PRESETS[like]), "source": f"like {like}, with your own figures"} if like else {}
    known = [field.name for field in fields(Hardware)]
    for key, value in plain.items():
        if key not in known:
            raise ConfigError(f"hardware has no {key!r}.{did_you_mean(key, known)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if key != "source" and not is_number:
            raise ConfigError(f"hardware {key} is {value!r}. Give a positive number.")
    missing = [key for key in _REQUIRED if key not in {**base, **plain}]
    if missing:
        raise ConfigError(f'the hardware lacks {", ".join(missing)}. Add them, or start from a preset with "like".')
    return Hardware(**{**base, **plain})
