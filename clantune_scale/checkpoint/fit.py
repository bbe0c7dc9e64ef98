"""Whether a saved round fits the run that is to go on from it, and the difference where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clantune_scale.errors import CheckpointError
from clantune_scale.tracking.events import to_plain

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan

# What can change from launch to launch without any effect on what is computed.
_WITHOUT_EFFECT = ("enabled", "tracking", "checkpoint", "transfer", "join", "faults")
# What a launch with another batch, optimizer, or data, may have changed without a word in its config.
_GENES_FOLLOW = (
    " Genes that the config does not name follow from data, batch and optimizer: name the run's in clantune.genes."
)
# Names that `clantune.checkpoint.allow` takes beside the block's own keys.
PARAMETERS = "parameters"


def settings_of(clan: Clan) -> dict[str, Any]:
    """What two launches of one run have in common, by the names that ``checkpoint.allow`` knows."""
    block = {key: value for key, value in to_plain(clan.config).items() if key not in _WITHOUT_EFFECT}
    topology = clan.world.topology
    found = {
        **block,
        "genes": [asdict(gene) for gene in clan.genes],
        "total_steps": clan.strategy.facts.total_steps,
        "topology": {"dp": topology.dp, "pp": topology.pp, "tp": topology.tp},
        "batch": asdict(clan.batch),
        "optimizer": clan.backend.optimizer_name(),
        "nonfinite_mask": clan.config.faults.nonfinite_mask,
    }
    return to_plain(found)


def check_settings(saved: Mapping[str, Any], live: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Raises CheckpointError with every difference that is not allowed by name."""
    allowed = set(allow)
    if allowed & {"population_size", "topology"}:
        # The clan's batch is divided among members and their ranks: another number of them divides it otherwise.
        allowed.add("batch")
    names = [name for name in {**saved, **live} if saved.get(name) != live.get(name) and name not in allowed]
    if names:
        lines = [f"\n  {name}: {_difference(saved.get(name), live.get(name))}" for name in names]
        raise CheckpointError(
            f"the round that was saved does not fit this launch:{''.join(lines)}\nLaunch with the settings that it "
            f"was saved under, or allow what is meant: clantune.checkpoint.allow: {sorted(names)}."
            f"{_GENES_FOLLOW if 'genes' in names else ''}"
        )


def layout_difference(saved: Sequence[Sequence[Any]], live: Sequence[Sequence[Any]]) -> str | None:
    """The first entries ([name, ...]) in which two layouts differ, or None."""
    before, now = ({entry[0]: list(entry[1:]) for entry in layout} for layout in (saved, live))
    wrong = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not wrong:
        return None
    told = [
        f"{name}: {before.get(name, 'nothing')} was saved, this launch has {now.get(name, 'nothing')}"
        for name in wrong[:3]
    ]
    return "; ".join(told) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _difference(saved: Any, live: Any) -> str:
    """Two values, or where both are mappings the keys in which they differ."""
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        keys = [key for key in {**saved, **live} if saved.get(key) != live.get(key)]
        return ", ".join(f"{key} {saved.get(key)!r} was saved, this launch has {live.get(key)!r}" for key in keys)
    return f"{saved!r} was saved, this launch has {live!r}"
