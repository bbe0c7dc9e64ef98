"""What a process that starts itself again remembers."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass

from clantune_scale.distributed.bootstrap import AGENT_VARIABLES, LAUNCH_VARIABLES, Address

VARIABLE = "CLANTUNE_GENERATION"


@dataclass(frozen=True)
class Generation:
    """The epoch that begins, and how the one before ended. Members have the numbers that they were launched with.

    Attributes:
        number: 0 is the launch.
        members: of the epoch before: those that may come.
        addresses: where the store of each of these members was; the clan's is on one of them now.
        launch: the launcher's variables, which joining rewrites; None for one that was not set.
        launch_id: the same for all processes of a launch, and for no two launches.
        run_dir: the run's folder; None where none was opened yet.
        failure: what this process saw of the failure.
        failed_at: when, in seconds of the epoch of time.
        num_idle: epochs in a row before this one that lost nobody and came to no further round.
        newest: the last committed round when this epoch began.
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
        """The epoch that this process is to join; 0 where nobody restarted it."""
        if VARIABLE not in environ:
            return cls(launch={name: environ.get(name) for name in LAUNCH_VARIABLES + AGENT_VARIABLES})
        found = json.loads(environ[VARIABLE])
        found["addresses"] = tuple((host, port) for host, port in found["addresses"])
        return cls(**{**found, "members": tuple(found["members"])})

    def write(self, environ: MutableMapping[str, str]) -> None:
        """Puts it, and the launcher's variables, into the environment that the next start finds."""
        environ[VARIABLE] = json.dumps(asdict(self))
        for name, value in (self.launch or {}).items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value
