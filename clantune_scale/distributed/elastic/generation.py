"""What a process hands over to itself when it restarts."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass

from clantune_scale.distributed.bootstrap import AGENT_VARIABLES, LAUNCH_VARIABLES, Address

VARIABLE = "CLANTUNE_GENERATION"


@dataclass(frozen=True)
class Generation:
    """The generation that begins, and how the one before ended. Members have the numbers that they were launched with.

    Attributes:
        number: 0 is the launch.
        members: of the generation before. These may take part.
        addresses: the address of each of these members' stores. The clan's new store is at one of them.
        launch: the launcher's variables, which joining rewrites; None for a variable that was not set.
        launch_id: equal on all processes of a launch, and different for each launch.
        run_dir: the run's folder; None if no run was opened yet.
        failure: what this process saw of the failure.
        failed_at: when it saw it, in Unix seconds.
        num_idle: consecutive generations before this one that lost no member and committed no round.
        newest: the last committed round when this generation began.
    """

    number: int = 0
    members: tuple[int, ...] = ()
    addresses: tuple[Address, ...] = ()
    launch: Mapping[str, str | None] | None = None
    launch_id: str = ""
    run_dir: str | None = None
    failure: str = ""
    failed_at: float = 0.0
    num_idle: int = 0
    newest: str | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Generation:
        """The generation that this process joins; number 0 if the process was not restarted."""
        if VARIABLE not in environ:
            return cls(launch={name: environ.get(name) for name in LAUNCH_VARIABLES + AGENT_VARIABLES})
        found = json.loads(environ[VARIABLE])
        found["addresses"] = tuple((host, port) for host, port in found["addresses"])
        return cls(**{**found, "members": tuple(found["members"])})

    def write(self, environ: MutableMapping[str, str]) -> None:
        """Writes this generation and the launcher's variables into the environment of the restarted process."""
        environ[VARIABLE] = json.dumps(asdict(self))
        for name, value in (self.launch or {}).items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value
