"""A fault at (rank, step, point): ``CLANTUNE_FAULTS`` lists them, and :func:`install` injects them.

A point is a function of this package. A fault is injected when the function is entered, or when it returns if the
point's name ends in ``:after``. The package itself does not know of the faults.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clantune_scale.bench.faults.actions import ACTIONS
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.errors import ConfigError

VARIABLE = "CLANTUNE_FAULTS"

#: Name to (module, function), in the order in which a round reaches them.
POINTS: dict[str, tuple[str, str]] = {
    "join": ("clantune_scale.distributed.world", "open_replica_group"),
    "start": ("clantune_scale.runtime.clan", "Clan._begin_run"),
    "forward": ("clantune_scale.data.watch", "BatchWatch.on_batch"),
    "step": ("clantune_scale.runtime.clan", "Clan._after_step"),
    "evaluation": ("clantune_scale.runtime.validation_window", "ValidationWindow.losses"),
    "diagnostics": ("clantune_scale.runtime.members", "gather_diagnostics"),
    "decision": ("clantune_scale.runtime.clan", "decide"),
    "transfer": ("clantune_scale.transfer.transfers", "Transfers.run"),
    "record": ("clantune_scale.runtime.recorder", "Recorder.round_end"),
    "commit": ("clantune_scale.checkpoint.durable", "DurableRounds.round_ended"),
    "manifest": ("clantune_scale.checkpoint.manifest", "write"),
    "latest": ("clantune_scale.checkpoint.manifest", "point_latest"),
    "phase": ("clantune_scale.runtime.clan", "Clan._begin_phase"),
    "finish": ("clantune_scale.runtime.clan", "Clan.finish"),
    "champion": ("clantune_scale.results.champion", "write"),
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        rank: of the launch, ``member x ranks of a member + rank in the member``.
        point: one of :data:`POINTS`, with ``:after`` appended for its end.
        step: number of finished optimizer steps; None for the first time that the point is reached.
        action: one of :data:`clantune_scale.bench.faults.actions.ACTIONS`.
        generation: number of the generation it is injected in. Restarted processes reach the same point again.
    """

    rank: int
    point: str
    step: int | None = None
    action: str = "kill"
    generation: int = 0

    def __post_init__(self) -> None:
        if self.point.removesuffix(":after") not in POINTS or self.action not in ACTIONS:
            raise ConfigError(
                f"there is no fault {self.action!r} at {self.point!r}. Points are {list(POINTS)}, with or without "
                f":after; actions are {list(ACTIONS)}."
            )


def to_environ(faults: Iterable[Fault]) -> dict[str, str]:
    """The variable that :func:`install` reads."""
    return {VARIABLE: json.dumps([asdict(fault) for fault in faults])}


def install(environ: Mapping[str, str] = os.environ) -> list[Fault]:
    """Injects the faults of this process into the package, for the rest of its life; returns them."""
    rank, generation = int(environ["RANK"]), Generation.read(environ).number
    faults = [Fault(**fault) for fault in json.loads(environ.get(VARIABLE, "[]"))]
    mine = [fault for fault in faults if (fault.rank, fault.generation) == (rank, generation)]
    if mine:
        clans = _clans()
        for fault in mine:
            _put(fault, clans)
    return mine


def _clans() -> list[Any]:
    """The list that will hold the clan of this process, from which the step is read."""
    from clantune_scale.runtime.clan import Clan

    clans: list[Any] = []
    make = Clan.__init__

    @functools.wraps(make)
    def remember(self: Any, *args: Any, **options: Any) -> None:
        clans.append(self)
        make(self, *args, **options)

    setattr(Clan, "__init__", remember)  # noqa: B010 - mypy allows no assignment to a method
    return clans


def _put(fault: Fault, clans: list[Any]) -> None:
    module, path = POINTS[fault.point.removesuffix(":after")]
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    is_injected = False

    def inject() -> None:
        nonlocal is_injected
        phases = getattr(clans[-1], "phases", None) if clans else None
        step = phases.position.step if phases is not None else 0
        if not is_injected and fault.step in (None, step):
            is_injected = True
            ACTIONS[fault.action](clans[-1] if clans else None)

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        if not fault.point.endswith(":after"):
            inject()
        result = function(*args, **options)
        if fault.point.endswith(":after"):
            inject()
        return result

    setattr(owner, name, wrapped)
