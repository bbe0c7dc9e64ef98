"""Whether a saved round fits the run that is to continue it, and the differences if it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from clantune_scale.checkpoint.run_state import RunView
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking.events import to_plain

# Keys that may change from launch to launch: they have no effect on what is computed.
_WITHOUT_EFFECT = ("enabled", "tracking", "checkpoint", "transfer", "join", "faults")
# Default genes depend on data, batch and optimizer, which can change while the config stays the same.
_GENES_FOLLOW = (
    " Genes that the config does not name depend on data, batch and optimizer: name the run's genes in clantune.genes."
)
# A name that `clantune.checkpoint.allow` takes in addition to the block's keys.
PARAMETERS = "parameters"


def settings_of(view: RunView) -> dict[str, Any]:
    """The settings that all launches of one run share, by the names that ``checkpoint.allow`` takes."""
    block = {key: value for key, value in to_plain(view.config).items() if key not in _WITHOUT_EFFECT}
    topology = view.world.topology
    found = {
        **block,
        "genes": [asdict(gene) for gene in view.genes],
        "total_steps": view.strategy.facts.total_steps,
        "topology": {"dp": topology.dp, "pp": topology.pp, "tp": topology.tp},
        "batch": asdict(view.batch),
        "optimizer": view.backend.optimizer_name(),
        "nonfinite_mask": view.config.faults.nonfinite_mask,
    }
    return to_plain(found)


def check_settings(saved: Mapping[str, Any], live: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Raises CheckpointError with every difference that is not allowed by name."""
    allowed = set(allow)
    if allowed & {"population_size", "topology"}:
        # The clan's batch is divided among members and their ranks, so it changes with their number.
        allowed.add("batch")
    names = [name for name in {**saved, **live} if saved.get(name) != live.get(name) and name not in allowed]
    if names:
        lines = [f"\n  {name}: {_difference(saved.get(name), live.get(name))}" for name in names]
        raise CheckpointError(
            f"the saved round does not fit this launch:{''.join(lines)}\nLaunch with the settings of the "
            f"saved round, or allow the differences: clantune.checkpoint.allow: {sorted(names)}."
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
    """Describes two values; of two mappings, only the keys in which they differ."""
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        keys = [key for key in {**saved, **live} if saved.get(key) != live.get(key)]
        return ", ".join(f"{key} {saved.get(key)!r} was saved, this launch has {live.get(key)!r}" for key in keys)
    return f"{saved!r} was saved, this launch has {live!r}"
