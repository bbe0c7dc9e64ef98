"""Replaying in a run without a clan what no optimizer group holds. ``ClanScheduleLR`` replays the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clantune_scale.core.genome import Gene
from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.genome_application import Expression, Setter


class BetweenSteps:
    """The genes that no optimizer group holds: clip threshold, accumulation, dropout, and setters of your own.

    Call :meth:`apply` before each step's first micro-batch.

    Args:
        backend: the engine, for example ``DeepSpeedBackend(engine)``.
        schedule: what ``clantune schedule`` gives.
        setters: by target, as they were given to the clan.
    """

    def __init__(self, backend: Backend, schedule: ClanSchedule, setters: Mapping[str, Setter] | None = None) -> None:
        self._backend, self._schedule = backend, schedule
        own = setters or {}
        self.genes: Sequence[Gene] = [
            gene
            for gene in schedule.described_genes
            if gene.target in own or gene.target in ("clip", "accumulation", "dropout")
        ]
        self._expression = Expression(self.genes, backend, own)

    def apply(self) -> None:
        """Puts into effect what the schedule says of the next step."""
        step = self._backend.num_steps
        self._expression.express({gene.name: self._schedule.value_at(gene.name, step) for gene in self.genes})

    def restore(self) -> None:
        """Sets clip threshold, accumulation and dropout to what they were."""
        self._expression.restore()
