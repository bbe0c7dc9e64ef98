"""What the clan sees of its rounds on disk: open a run, write as it goes, stop."""

from __future__ import annotations

import atexit
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from clantune_scale.checkpoint import fit, manifest
from clantune_scale.checkpoint.capture import Capture
from clantune_scale.checkpoint.everyone import Everyone
from clantune_scale.checkpoint.lock import RunLock
from clantune_scale.checkpoint.opening import Opening, open_run, put_aside
from clantune_scale.checkpoint.restore import fault_of, restore_clan
from clantune_scale.checkpoint.streams import RandomStreams
from clantune_scale.checkpoint.writer import RoundWriter
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies import Decision
from clantune_scale.data import ClanBatchSampler

if TYPE_CHECKING:
    from clantune_scale.clan import Clan


class DurableRounds:
    """One clan's rounds on disk. All ranks of the clan call each method alike.

    Args:
        clan: whose they are; its world, backend, strategy and groups are there.

    Attributes:
        opening: the run's folder, and the round that it is continued from.

    Raises:
        CheckpointError: if a run is to be continued and cannot be, or another process works on it.
    """

    def __init__(self, clan: Clan) -> None:
        self._clan, self._settings = clan, clan.config.checkpoint
        self._everyone = Everyone(clan.world, clan.groups)
        self.opening = open_run(clan.config, self._everyone, self._fault)
        self._content: dict[str, Any] = {"settings": fit.settings_of(clan)}
        if self.opening.content is not None:
            fit.check_settings(self.opening.content["settings"], self._content["settings"], self._settings.allow)
        self._folder = self.opening.run_dir / manifest.FOLDER
        self._lock: RunLock | None = None
        self._prepare()
        self._writer: RoundWriter | None = None
        self._places: list[dict[str, int]] = []
        self._streams: RandomStreams | None = None

    @property
    def run_dir(self) -> Path:
        return self.opening.run_dir

    def _fault(self, folder: Path, content: dict[str, Any]) -> str | None:
        return fault_of(folder, content, self._clan.world.at, self._sources(content))

    def _sources(self, content: dict[str, Any]) -> Sequence[int]:
        return range(self._clan.config.population_size)

    def _prepare(self) -> None:
        """The leader takes the folder; what it cannot do is raised everywhere."""
        trouble = None
        if self._everyone.is_leader:
            try:
                self._lock = RunLock(self.run_dir)
                atexit.register(self._lock.release)
                self._folder.mkdir(exist_ok=True)
                if self.opening.content is not None:
                    put_aside(self._folder, self.opening.name)
            except CheckpointError as error:
                trouble = str(error)
        trouble = self._everyone.from_leader(trouble)
        if trouble is not None:
            raise CheckpointError(trouble)
