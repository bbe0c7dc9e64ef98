"""The grid of ranks: which member a rank belongs to, its replica group, and the ranks that it averages gradients with.

The launcher's ranks are ordered ``[member, pipeline, data, tensor]``, tensor fastest, as in DeepSpeed and
Megatron-core. A member is a contiguous block of ranks, so its traffic stays inside a node. Nothing here needs a
process group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clantune_scale.errors import TopologyError


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of one rank.

    Attributes:
        rank: its rank in the launcher's world.
        member: the member that it belongs to.
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
        """The topology of a launch. The data-parallel degree is ``world_size / (population_size x pp x tp)``.

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
        """The number of ranks in a member's world."""
        return self.dp * self.pp * self.tp

    @property
    def world_size(self) -> int:
        """The number of ranks that the launcher starts."""
        return self.population_size * self.member_size

    @property
    def grid(self) -> np.ndarray:
        """[population_size, pp, dp, tp] int64: the rank at each coordinate."""
        return np.arange(self.world_size).reshape(self.population_size, self.pp, self.dp, self.tp)

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of ``rank``.

        Raises:
            TopologyError: if ``rank`` is outside the launcher's world.
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
        """This rank and its peers, one rank per member: the ranks that hold the same shard."""
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
