"""A fault at (rank, step, point): ``CLANTUNE_FAULTS`` says which, and :func:`install` puts them where they strike.

A point is a function of this package; a fault strikes as it is entered, or, with ``:after`` behind the point's name,
as it is left. Nothing in the package knows of it.
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

#: Name to the module and the function in it, in the order in which a round comes to them.
POINTS: dict[str, tuple[str, str]] = {
    "join": ("clantune_scale.distributed.world", "open_replica_group"),
    "start": ("clantune_scale.runtime.clan", "Clan._begin_run"),
    "forward": ("clantune_scale.data.watch", "BatchWatch.on_batch"),
    "step": ("clantune_scale.runtime.clan", "Clan._after_step"),
    "evaluation": ("clantune_scale.runtime.validation_window", "ValidationWindow.losses"),
    "diagnostics": ("clantune_scale.runtime.clan", "gather_diagnostics"),
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
    """What happens where.

    Attributes:
        rank: of the launch, ``member x ranks of a member + rank in the member``.
        point: one of :data:`POINTS`, with ``:after`` behind it for its end.
        step: optimizer steps that are done; None for the first time that the point is reached.
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
                f"there is no fault {self.action!r} at {self.point!r}. Points are {list(POINTS)}, with :after behind "
                f"them or not; actions are {list(ACTIONS)}."
            )


def to_environ(faults: Iterable[Fault]) -> dict[str, str]:
    """The variable that :func:`install` reads."""
    return {VARIABLE: json.dumps([asdict(fault) for fault in faults])}


def install(environ: Mapping[str, str] = os.environ) -> list[Fault]:
    """Puts the faults of this process into the package; those that it has, to be taken out again by nobody."""
    rank, generation = int(environ["RANK"]), Generation.read(environ).number
    faults = [Fault(**fault) for fault in json.loads(environ.get(VARIABLE, "[]"))]
    mine = [fault for fault in faults if (fault.rank, fault.generation) == (rank, generation)]
    if mine:
        clans = _clans()
        for fault in mine:
            _put(fault, clans)
    return mine


def _clans() -> list[Any]:
    """The list that the clan of this process will be in: it knows the step."""
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
    has_struck = False

    def strike() -> None:
        nonlocal has_struck
        phases = getattr(clans[-1], "phases", None) if clans else None
        step = phases.position.step if phases is not None else 0
        if not has_struck and fault.step in (None, step):
            has_struck = True
            ACTIONS[fault.action](clans[-1] if clans else None)

    @functools.wraps(function)
    def struck(*args: Any, **options: Any) -> Any:
        if not fault.point.endswith(":after"):
            strike()
        result = function(*args, **options)
        if fault.point.endswith(":after"):
            strike()
        return result

    setattr(owner, name, struck)
