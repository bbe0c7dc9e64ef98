"""Members on the line, as rows: all rows of a clan train as its centre and part at the round's end.

The training loss is then the centre's, and not the members' mean (see :mod:`clantune_scale.core.line`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clantune_scale.bench.batched.state import State
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.line import (
    DecayRule,
    Line,
    Point,
    decay_reach,
    kept_share,
    obstacle,
    only_the_last,
    reads,
)
from clantune_scale.core.rounds import PhaseKind, RoundPlan

#: A batched model has one group of parameters; genes for some groups only are refused elsewhere.
ONE_GROUP = ("0",)


class LineRound:
    """A round in which some clans are on the line; the others' members are left as they train.

    Args:
        lines: [clans]; None for a clan whose members are real in this round.
        rules: [clans] how its optimizer applies a weight decay.
        plan: of the round, whose lengths and averages are the same for all clans.
        state: at the round's start.
        average_every: steps from one update of the average to the next.
        sizes: of a row's stretches, one for each group in the lines; empty if there is one group.
    """

    def __init__(
        self,
        lines: Sequence[Line | None],
        rules: Sequence[DecayRule],
        plan: RoundPlan,
        state: State,
        *,
        average_every: int = 1,
        sizes: Sequence[int] = (),
    ) -> None:
        self._averages = plan.uses_ema
        dtype = state.weights.dtype
        size = state.weights.shape[1]
        points = [line.points if line is not None else None for line in lines]
        still = Point((1.0,) * max(1, len(sizes)), (0.0,) * max(1, len(sizes)))
        every = [own or (still,) * size for own in points]
        self._rates = _columns([[p.rates for p in own] for own in every], sizes, dtype)
        self._decays = _columns([[p.decays for p in own] for own in every], sizes, dtype)
        self._start = state.weights.clone()
        # The average at the round's end, had the weights not moved.
        self._anchor = torch.lerp(state.weights, state.average, kept_share(plan)) if plan.uses_ema else None
        self._sums = [torch.zeros_like(state.weights) for _ in range(1 + plan.uses_ema)]
        sources = [only_the_last(plan), reads(plan, every=average_every)][: len(self._sums)]
        # [roles][clans, steps]
        self._reach = [
            torch.tensor([decay_reach(source, rule) for rule in rules], dtype=torch.float64) for source in sources
        ]
        self._varies_decay = bool(self._decays.any())

    @torch.no_grad()
    def before_update(self, state: State, offset: int, rates: torch.Tensor, decays: torch.Tensor) -> None:
        """Takes in the decay of a step.

        Args:
            state: before it.
            offset: of the step in its round.
            rates: [clans, members or 1, 1] float64 learning rates in effect.
            decays: [clans, members or 1, 1] float64 weight decays in effect.
        """
        if not self._varies_decay:
            return
        for total, reach in zip(self._sums, self._reach, strict=True):
            share = rates * decays * reach[:, offset].view(-1, 1, 1)
            total.addcmul_(state.weights, share.to(total.dtype))

    @torch.no_grad()
    def part(self, state: State) -> None:
        """Every row goes from the centre to its member's point."""
        roles = [(state.weights, self._start), (state.average, self._anchor)]
        for (rows, anchor), decayed in zip(roles, self._sums, strict=False):
            if anchor is not None:
                rows.add_((rows - anchor) * (self._rates - 1.0) - decayed * self._decays)

    def travelled(self, average: torch.Tensor) -> torch.Tensor:
        """[clans, members, size] how far the round has moved the averages, members being at their points."""
        assert self._anchor is not None
        return average - self._anchor


def line_of(
    genomes: Sequence[Genome], genes: Sequence[Gene], plan: RoundPlan, groups: Sequence[str] = ONE_GROUP
) -> Line | None:
    """The clan's line in a round; None if its members do not part on one, or cannot be computed from one model."""
    if any(phase.kind is PhaseKind.COMPETITIVE for phase in plan.phases) or obstacle(plan, genomes, genes):
        return None
    line = Line.of(genomes, genes, groups)
    return line if line.varies_rate or line.varies_decay else None


def _columns(table: Sequence[Sequence[Sequence[float]]], sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """[clans, members, 1], or [clans, members, size] by group if there are several."""
    columns = torch.tensor(table, dtype=torch.float64).to(dtype)
    return columns.repeat_interleave(torch.tensor(sizes), dim=2) if sizes else columns
