"""A member is a world: which rank is whose, who stands in a column, and which ranks average gradients.

The launcher's ranks are ordered ``[member, pipeline, data, tensor]``, tensor fastest, as DeepSpeed and
Megatron-core order theirs, so that a member is a contiguous block of ranks and its traffic stays in a node.
Nothing here starts or needs a process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clantune_scale.errors import TopologyError


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands.

    Attributes:
        rank: in the launcher's world.
        member: which member it belongs to.
        member_rank: its rank in the member's own world.
        pp, dp, tp: its pipeline, data and tensor coordinates inside the member.
    """

    rank: int
    member: int
    member_rank: int
    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """The grid of all ranks: ``population_size x pp x dp x tp``.

    Attributes:
        population_size: members in the clan.
        dp, pp, tp: a member's data, pipeline and tensor (times context) degrees.
    """

    population_size: int
    dp: int = 1
    pp: int = 1
    tp: int = 1

    @classmethod
    def from_world(cls, world_size: int, *, population_size: int, pp: int = 1, tp: int = 1) -> Topology:
        """The topology in which the data-parallel degree is what the launcher's ranks leave over.

        Raises:
            TopologyError: if ``world_size`` is not a multiple of ``population_size x pp x tp``.
        """
        fixed = population_size * pp * tp
        dp, rest = divmod(world_size, fixed)
        if rest or dp < 1:
            down = max(1, world_size // fixed) * fixed
            divisors = [p for p in range(1, world_size // (pp * tp) + 1) if world_size % (p * pp * tp) == 0]
            remedy = (
                f"Launch {down} or {down + fixed} ranks, or set population_size to one of {divisors}."
                if divisors and world_size > fixed
                else f"Launch {fixed} ranks or a multiple."
            )
            raise TopologyError(
                f"population_size({population_size}) x pp({pp}) x tp({tp}) = {fixed} does not divide the "
                f"{world_size} ranks that the launcher started. {remedy}"
            )
        return cls(population_size=population_size, dp=dp, pp=pp, tp=tp)

    @property
    def member_size(self) -> int:
        """Ranks in a member's world."""
        return self.dp * self.pp * self.tp

    @property
    def world_size(self) -> int:
        """Ranks that the launcher starts."""
        return self.population_size * self.member_size

    @property
    def grid(self) -> np.ndarray:
        """[population_size, pp, dp, tp] int64: the rank at each coordinate."""
        return np.arange(self.world_size).reshape(self.population_size, self.pp, self.dp, self.tp)

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands.

        Raises:
            TopologyError: if the launcher's world has no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank} is outside the clan's {self.world_size} ranks. Launch that many.")
        member, member_rank = divmod(rank, self.member_size)
        pp, rest = divmod(member_rank, self.dp * self.tp)
        dp, tp = divmod(rest, self.tp)
        return Coordinates(rank, member, member_rank, pp, dp, tp)

    def member_ranks(self, member: int) -> list[int]:
        """The launcher's ranks of one member, in the order of its own world."""
        return list(range(member * self.member_size, (member + 1) * self.member_size))

    def replica_group_ranks(self, rank: int) -> list[int]:
        """One rank per member: those whose shards correspond one to one to this rank's."""
        return list(range(rank % self.member_size, self.world_size, self.member_size))

    def gradient_ranks(self, rank: int) -> list[int]:
        """All (member, data) ranks that hold the same (pipeline, tensor) part as this one."""
        at = self.coordinates(rank)
        return self.grid[:, at.pp, :, at.tp].ravel().tolist()

    def describe(self) -> str:
        """The equation, for the log."""
        return (
            f"{self.population_size} members x (dp {self.dp} x pp {self.pp} x tp {self.tp}) = {self.world_size} ranks"
        )
