"""A run's events as arrays over rounds and members: what the report draws and reasons from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.tracking.background import Event


@dataclass
class Run:
    """A run as far as it has come; R finished rounds, M members.

    Attributes:
        start: its ``run_start`` event.
        end: its ``run_end`` event; None while the run goes on, or if it was killed.
        genes: of its genomes.
        start_steps: [R] optimizer steps that were done before each round.
        end_steps: [R] optimizer steps that were done after it.
        measured: by name (loss, standard_error, gradient_norm, drift, alignment, ``strikes``), [R, M] float64.
            ``strikes`` is the key of the non-finite micro-batches. All nan if the events do not have the measurement.
        values: by gene, [R, M]; what each member carried through the round.
        step_sizes: by gene, [R, M], scale units.
        consensus: by gene, [R]; the clan's one value.
        donors: [R, M] whose state each member received at the round's end; itself if it kept its own.
        restored: [R] bool; the clan was rolled back.
        undone: [R] bool; the round's training was discarded by a rollback.
        explores: by round, the genes in which members might differ; None if the events do not say.
        rates: [R, M] learning rate of the first parameter group at the round's end.
        lr_factor: [R] the final decay's share in its last step.
        scheduled_rate: [R] the same group's rate by the user's own schedule; nan if the events do not say.
        seconds: by what they were spent on, [R].
        competitive: [K, 2] first and last step of every competitive phase.
        training: [S, 3] step, training loss and seconds per step.
        throughput: by phase kind, [samples, tokens or nan, seconds] in all.
        samples: trained by the clan so far; None if the events do not say.
        tokens: the same in tokens.
        stragglers: (step, member, seconds) of each round that had one.
        overfitting: steps of the rounds' ends at which the strategy reported overfitting.
        warnings: (step, message).
    """

    start: Event
    end: Event | None
    genes: tuple[Gene, ...]
    start_steps: np.ndarray
    end_steps: np.ndarray
    measured: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    step_sizes: dict[str, np.ndarray]
    consensus: dict[str, np.ndarray]
    donors: np.ndarray
    restored: np.ndarray
    undone: np.ndarray
    explores: list[tuple[str, ...] | None]
    rates: np.ndarray
    lr_factor: np.ndarray
    scheduled_rate: np.ndarray
    seconds: dict[str, np.ndarray]
    competitive: np.ndarray
    training: np.ndarray
    throughput: dict[str, np.ndarray]
    samples: int | None
    tokens: int | None
    stragglers: list[tuple[int, int, float]]
    overfitting: list[int]
    warnings: list[tuple[int, str]]

    @property
    def num_rounds(self) -> int:
        """Rounds that ended."""
        return len(self.end_steps)

    @property
    def num_members(self) -> int:
        """Members of the clan."""
        return self.donors.shape[1]

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were done in finished rounds."""
        return int(self.end_steps[-1])

    @property
    def loss(self) -> np.ndarray:
        """[R, M] mean loss on the common window; not finite if a member's was not."""
        return self.measured["loss"]

    @property
    def best(self) -> int:
        """The champion; the fittest member of the last round that had one where none is chosen yet."""
        if self.end is not None and self.end.get("champion") is not None:
            return int(self.end["champion"])
        finite = np.where(np.isfinite(self.loss), self.loss, np.inf)
        with_any = np.flatnonzero(np.isfinite(finite).any(axis=1))
        return int(finite[with_any[-1]].argmin()) if len(with_any) else 0

    @property
    def frozen_round(self) -> int | None:
        """The first round after the last in which members might differ; None while they may, or where unknown."""
        if any(names is None for names in self.explores):
            return None
        exploring = [index for index, names in enumerate(self.explores) if names]
        after = exploring[-1] + 1 if exploring else self.num_rounds
        return after if after < self.num_rounds else None

    def ancestry(self, member: int) -> np.ndarray:
        """[R] who trained, in each round, the state that ``member`` carries now, as ``Lineage.ancestry`` has it.

        A round that was restored away has the member whose genome is carried on, as no state of it is.
        """
        ancestors = np.empty(self.num_rounds, dtype=int)
        for index in range(self.num_rounds - 1, -1, -1):
            member = ancestors[index] = self.donors[index, member]
        return ancestors

    def has(self, name: str) -> bool:
        """Whether the events carry this measurement at all."""
        return bool(np.isfinite(self.measured[name]).any())
