"""The arithmetic of the line on lists of tensors: what a round stores, and how a point is written.

Every operation is elementwise, so that the tensors may be one rank's shards. ``clantune_scale.core.line`` has the
formulas. Beyond the model and its running average, a round stores the start of the weights and the anchor of the
average if learning rates vary, and the decay of both if weight decays vary. A round that only observes stores only the
average's. While points are written, the centre's weights are stored too, at a time when there are no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from clantune_scale.core.line import DecayRule, Line, Point, decay_reach, kept_share, only_the_last, reads
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.runtime.elementwise import in_pieces, summing_dtype

Tensors = Sequence[torch.Tensor]


class Points:
    """A cooperative round on the line, from its first step to its end.

    Create it before the round's first step. Averages are right at the round's end, for which their anchor is made.

    Args:
        weights: returns the live weights, always the same tensors' worth: fp32 masters if there are any. In 16 bits
            they are rounded as they are written, to the nearest; all that is computed is in fp32.
        average: their running average, kept up to date by the caller; None if the round has none. In fp32 or more.
        group_of: [parameters] index of each one's parameter group.
        line: where members lie.
        plan: of the round.
        rules: [groups] how a decay reaches the weights; None if no decay varies.
        moves_weights: whether weights can be written too; an observer, whose training goes on from the centre, saves
            a start and a decay.
        device: of the stored start and centre; None for the weights' own.
        average_every: steps from one update of the average to the next.
    """

    def __init__(
        self,
        weights: Callable[[], Tensors],
        average: Tensors | None,
        *,
        group_of: Sequence[int],
        line: Line,
        plan: RoundPlan,
        rules: Sequence[DecayRule | None],
        moves_weights: bool = True,
        device: torch.device | None = None,
        average_every: int = 1,
    ) -> None:
        self._weights, self._average, self._group_of, self._device = weights, average, group_of, device
        self._line, self._moves_weights = line, moves_weights
        self._start: list[torch.Tensor] | None = None
        self._anchor: list[torch.Tensor] | None = None
        if line.varies_rate:
            self._keep_start(kept_share(plan))
        self._decay: list[torch.Tensor] | None = None
        self._average_decay: list[torch.Tensor] | None = None
        # For each of the two: the sum W, and by group and step how much of a decay reaches it.
        self._sums: list[tuple[list[torch.Tensor], list[list[float]]]] = []
        if line.varies_decay:
            known = [rule or DecayRule() for rule in rules]
            if moves_weights:
                self._decay = _zeros(weights())
                self._sums.append((self._decay, [decay_reach(only_the_last(plan), rule) for rule in known]))
            if average is not None:
                self._average_decay = _zeros(weights())
                self._sums.append(
                    (self._average_decay, [decay_reach(reads(plan, every=average_every), rule) for rule in known])
                )

    @property
    def sums_decays(self) -> bool:
        """Whether the round takes in what each step's weight decay does."""
        return bool(self._sums)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What the round has stored so far, by name; values loaded into it continue a round that was stopped."""
        stored = {
            "start": self._start,
            "anchor": self._anchor,
            "decay": self._decay,
            "average_decay": self._average_decay,
        }
        return [
            (f"line_{kind}.{index}", tensor)
            for kind, tensors in stored.items()
            for index, tensor in enumerate(tensors or ())
        ]

    @torch.no_grad()
    def before_update(
        self, offset: int, rates: Sequence[float], decays: Sequence[float], changed: Sequence[bool] | None = None
    ) -> None:
        """Takes in what the centre's weight decay does in the step that follows; nothing if no decay varies.

        Args:
            offset: of the step in its round, from 0.
            rates: [groups] the centre's learning rates in that update, schedules and all.
            decays: [groups] its weight decays.
            changed: [parameters] whether the optimizer changes each; the others have no decay. All if None.
        """
        for sums, reach in self._sums:
            shares = [rate * decay * own[offset] for rate, decay, own in zip(rates, decays, reach, strict=True)]
            weights = self._weights()
            for total, weight, group, is_in in zip(
                sums, weights, self._group_of, changed or [True] * len(weights), strict=True
            ):
                if is_in:
                    total.add_(weight.detach(), alpha=shares[group])

    @contextmanager
    def held(self) -> Iterator[Callable[[int, bool], None]]:
        """Inside, members can be written into the model; on exit it holds the centre again, to the last bit.

        Yields:
            (member, averaged): writes that member's weights, or their average, into the model.
        """
        with torch.no_grad():
            centre = [self._kept(weight) for weight in self._weights()]

        @torch.no_grad()
        def write(member: int, averaged: bool) -> None:
            self._write(self._weights(), self._line.points[member], centre, averaged)

        try:
            yield write
        finally:
            with torch.no_grad():
                for weight, own in zip(self._weights(), centre, strict=True):
                    weight.copy_(own)

    @torch.no_grad()
    def slopes(self, member: int, gradient: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """[groups] float64: a loss's derivative by the logarithm of each group's learning rate, at a member's average.

        Args:
            member: at whose point.
            gradient: [parameters] of that loss there; None for a parameter that it does not depend on. If it is
                sharded as the weights are, so is what is returned: a part of the sum over ranks.
        """
        point = self._line.points[member]
        live = self._weights()
        totals = torch.zeros(len(point.rates), dtype=torch.float64, device=live[0].device if live else None)
        assert self._anchor is not None, "learning rates do not vary in this round"
        for own, value, anchor, group in zip(
            gradient, self._averages_at(point), self._anchor, self._group_of, strict=True
        ):
            if own is not None:
                travelled = value - anchor.to(value.device)
                totals[group] += (own.to(travelled) * travelled).sum(dtype=torch.float64)
        return totals

    @torch.no_grad()
    def go_on_from(self, point: Point) -> None:
        """Weights and average go to ``point``, where training goes on."""
        if point.is_centre:
            return
        self._write(self._weights(), point, self._weights(), False)
        if self._average is not None:
            self._write(self._average, point, None, True)

    def _averages_at(self, point: Point) -> Iterator[torch.Tensor]:
        """[parameters] a member's average, in the precision of sums."""
        assert self._average is not None and self._anchor is not None, "this round has no averages"
        for index, (average, group) in enumerate(zip(self._average, self._group_of, strict=True)):
            value = average.to(summing_dtype(average))
            if point.rates[group] != 1.0:
                value = value + (point.rates[group] - 1.0) * (value - self._anchor[index].to(value.device))
            if point.decays[group]:
                assert self._average_decay is not None
                value = value - point.decays[group] * self._average_decay[index].to(value.device)
            yield value

    def _write(self, targets: Tensors, point: Point, centre: Tensors | None, averaged: bool) -> None:
        """Writes a point, in the precision of sums up to the result, where the weights live."""
        if averaged:
            assert self._average is not None, "this round has no averages"
            centre, anchors, decays = self._average, self._anchor, self._average_decay
        else:
            assert centre is not None and (self._moves_weights or point.is_centre), "an observer writes no weights"
            anchors, decays = self._start, self._decay
        for index, (weight, group) in enumerate(zip(self._weights(), self._group_of, strict=True)):
            rate, decay, sources = point.rates[group], point.decays[group], [targets[index], centre[index]]
            if rate != 1.0:
                assert anchors is not None
                sources.append(anchors[index])
            if decay:
                assert decays is not None
                sources.append(decays[index])
            for target, own, *others in in_pieces(*sources):
                value = own.to(weight.device, summing_dtype(own))
                if rate != 1.0:
                    value = value + (rate - 1.0) * (value - others[0].to(weight.device))
                if decay:
                    value = value - decay * others[-1]
                target.copy_(value)

    @torch.no_grad()
    def _keep_start(self, kept: float) -> None:
        """Stores the weights at the round's start, and the average at its end had they not moved."""
        weights = self._weights()
        if self._moves_weights:
            self._start = [self._kept(weight) for weight in weights]
        if self._average is not None:
            self._anchor = [torch.empty_like(average, device=self._device) for average in self._average]
            for three in zip(self._anchor, weights, self._average, strict=True):
                for anchor, weight, average in in_pieces(*three):
                    anchor.copy_(weight.to(average).lerp(average, kept))

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self._device or tensor.device, copy=True)


def _zeros(tensors: Tensors) -> list[torch.Tensor]:
    return [torch.zeros_like(tensor, dtype=summing_dtype(tensor), requires_grad=False) for tensor in tensors]
