"""One model in place of P members: which rounds allow it, what it trains with, where each member lies.

Members that share every gradient and differ in a learning rate or a weight decay make updates that differ in known
factors. With theta_0 at the round's start, theta_c the centre's weights and W = sum_s lr_s lambda_s theta_c(s) the
decay that the centre has had, member i is, to first order in the perturbation,

    theta_i = theta_0 + k_i (theta_c - theta_0 - (lambda_i / lambda_c - 1) W),      k_i = lr_i / lr_c

The derivation: the member's update in step s is -k_i lr_s (u_s + lambda_i theta_i(s)). Members differ only in
theta_i(s) in the decay, and theta_c(s) stands for it. The error is lr x lambda x steps times the distance between the
two. Averages are linear in the weights and start alike, so the same holds for them, with an anchor and a W of their own
(:func:`reads`, :func:`decay_reach`).

The training loss of a round on the line is the centre's. Real members' mean is higher, by second order in their
distance. If a threshold of the strategy falls between the two, the two forms of a run part from that round on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clantune_scale.core.consensus import values_in_effect
from clantune_scale.core.fitness import Slopes
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision

#: What members on a line may differ in.
RATE, DECAY = "lr", "weight_decay"


@dataclass(frozen=True)
class DecayRule:
    """How a weight decay reaches the weights: by way of the momentum that the optimizer puts on it.

    A decoupled decay has none, and neither has SGD without momentum.

    Attributes:
        momentum: of heavy-ball momentum that takes the decay in with the gradient, 0 to below 1.
        dampening: torch's, of what momentum takes in.
        nesterov: whether the update looks a step ahead.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class Point:
    """A member's place, by parameter group: ``centre + (rate - 1) (centre - anchor) - decay W``.

    Attributes:
        rates: [groups] k, its learning rate over the centre's.
        decays: [groups] k (lambda / lambda_c - 1).
    """

    rates: tuple[float, ...]
    decays: tuple[float, ...]

    @property
    def is_centre(self) -> bool:
        """Whether the centre itself lies there."""
        return all(rate == 1.0 for rate in self.rates) and not any(self.decays)


@dataclass(frozen=True)
class Line:
    """A population on the line.

    Attributes:
        centre: by gene, what the one model trains with.
        points: [members].
    """

    centre: Mapping[str, float]
    points: tuple[Point, ...]

    @classmethod
    def of(cls, genomes: Sequence[Genome], genes: Sequence[Gene], groups: Sequence[str]) -> Line:
        """The line of a cooperative phase.

        The centre's rate is the arithmetic mean of the members' rates (and so for decays), so that the members' mean
        lies at the centre: the mean of their gradients is then, to first order, the centre's gradient.

        Args:
            genomes: [members].
            genes: all of the clan's.
            groups: names of the optimizer's parameter groups.
        """
        values = values_in_effect(genomes, genes, PhaseKind.COOPERATIVE)
        centre = {gene.name: _mean([own[gene.name] for own in values]) for gene in genes}
        return cls(centre, tuple(_point(own, centre, genes, groups) for own in values))

    @property
    def varies_rate(self) -> bool:
        """Whether any member's learning rate is not the centre's."""
        return any(rate != 1.0 for point in self.points for rate in point.rates)

    @property
    def varies_decay(self) -> bool:
        """Whether any member's weight decay is not the centre's."""
        return any(decay for point in self.points for decay in point.decays)

    def mixed(self, weights: Sequence[float]) -> Point:
        """The weighted mean of the members' points, itself a point.

        Args:
            weights: [members], summing to 1.
        """
        only = [index for index, weight in enumerate(weights) if weight]
        if len(only) == 1:
            return self.points[only[0]]
        shares = [(weights[index], self.points[index]) for index in only]
        columns = range(len(self.points[0].rates))
        return Point(
            tuple(math.fsum(weight * point.rates[g] for weight, point in shares) for g in columns),
            tuple(math.fsum(weight * point.decays[g] for weight, point in shares) for g in columns),
        )


def obstacle(
    plan: RoundPlan, genomes: Sequence[Genome], genes: Sequence[Gene], *, knows_decay: bool = True
) -> str | None:
    """Why one model cannot stand for all members in this round; None if it can.

    It trains at the centre while members cooperate. If they compete, it takes their turns, one after the other from
    one state.

    Args:
        plan: of the round.
        genomes: [members], all with one training state at the round's start.
        genes: all of the clan's.
        knows_decay: whether the optimizer's :class:`DecayRule` is known.
    """
    kinds = [phase.kind for phase in plan.phases]
    if PhaseKind.COMPETITIVE in kinds[:-1]:
        return "a phase follows a competitive one, after which members hold states of their own"
    if PhaseKind.COOPERATIVE not in kinds:
        return None
    values = values_in_effect(genomes, genes, PhaseKind.COOPERATIVE)
    apart = [gene for gene in genes if len({gene.expressed(own[gene.name]) for own in values}) > 1]
    if apart and PhaseKind.COMPETITIVE in kinds:
        return f"members differ in {apart[0].name!r} before they compete, so that no one state is their turns' start"
    for gene in apart:
        if gene.target not in (RATE, DECAY):
            return f"members differ in {gene.name!r} while they cooperate: its effect on an update has no closed form"
        if gene.target == DECAY and not knows_decay:
            return f"members differ in {gene.name!r}, and how the optimizer applies a weight decay is not known"
    return None


def successor(decision: Decision) -> tuple[float, ...] | None:
    """[members] weights of the one state that all members go on from; None if they go on from different ones."""
    members = range(len(decision.donors))
    if decision.mixing_weights is not None:
        shares = zip(decision.donors, decision.mixing_weights, strict=True)
        taken = [(donor, weight) for donor, weight in shares if weight]
        return tuple(math.fsum(weight for donor, weight in taken if donor == member) for member in members)
    if len(set(decision.donors)) > 1:
        return None
    return tuple(float(member == decision.donors[0]) for member in members)


def slope_members(genomes: Sequence[Genome], name: str) -> tuple[int, int]:
    """The members with the lowest and the highest value of a gene, at whose points slopes are measured."""
    values = [genome.values[name] for genome in genomes]
    return values.index(min(values)), values.index(max(values))


def slopes_of(
    members: tuple[int, int],
    tables: Sequence[Any],
    names: Sequence[str],
    genes: Sequence[Gene],
    groups: Sequence[str],
) -> Slopes:
    """Slopes by gene from slopes by parameter group.

    Args:
        members: at whose points.
        tables: [points] arrays [batches, groups].
        names: of the genes.
        genes: all of the clan's.
        groups: names of the optimizer's parameter groups.
    """
    table = np.array(tables, dtype=np.float64)
    by_gene = {}
    for gene in (gene for gene in genes if gene.name in names):
        written = [index for index, group in enumerate(groups) if gene.groups is None or group in gene.groups]
        by_gene[gene.name] = table[:, :, written].sum(axis=2)
    return Slopes(members, by_gene)


def averaging_weight(num_steps: int, window_steps: int) -> float:
    """How far an average moves towards the weights after a step: early on its window is 0.9 of the steps done."""
    return 1.0 / max(1.0, min(0.9 * num_steps, window_steps))


def averaging_weights(plan: RoundPlan, *, every: int = 1) -> list[float]:
    """[steps] how far the average moves towards the weights after each step of a round; 0 in steps that are left out.

    Args:
        plan: of the round.
        every: steps from one update to the next. An update stands for the steps since the one before, so that the
            average forgets as fast; the round's last step has one.
    """
    weights, left = [], 1.0
    for offset in range(plan.num_steps):
        left *= 1.0 - averaging_weight(plan.start_step + offset + 1, plan.ema_window_steps)
        is_update = (offset + 1) % every == 0 or offset + 1 == plan.num_steps
        weights.append(1.0 - left if is_update else 0.0)
        left = 1.0 if is_update else left
    return weights


def reads(plan: RoundPlan, *, every: int = 1) -> list[float]:
    """[steps] the share that the weights after each of the round's steps have in the average at its end.

    The rest, to 1, is the share of the average at the start. ``every`` is as in :func:`averaging_weights`.
    """
    shares, left = [], 1.0
    for weight in reversed(averaging_weights(plan, every=every)):
        shares.append(left * weight)
        left *= 1.0 - weight
    return shares[::-1]


def kept_share(plan: RoundPlan) -> float:
    """The share of the average at the round's start in the one at its end: q.

    The average's anchor, what it would be had the weights stayed at theta_0, is q E(0) + (1 - q) theta_0.
    """
    steps = range(plan.start_step + 1, plan.end_step + 1)
    return math.prod(1.0 - averaging_weight(step, plan.ema_window_steps) for step in steps)


def only_the_last(plan: RoundPlan) -> list[float]:
    """[steps] as :func:`reads`, for the weights themselves."""
    return [0.0] * (plan.num_steps - 1) + [1.0]


def decay_reach(read: Sequence[float], rule: DecayRule) -> list[float]:
    """[steps] how much of ``lr_s lambda_s theta_c(s)`` has reached what is read at the round's end.

    A decay that momentum m takes in with the gradient in step s has moved the weights after step t by
    (1 - m ** (t - s + 1)) / (1 - m) of itself, if the learning rate stays over the memory of the momentum.

    Args:
        read: [steps] from :func:`reads` or :func:`only_the_last`.
        rule: the optimizer's.
    """
    m, reach, rest, discounted = rule.momentum, list[float](), 0.0, 0.0
    for share in reversed(read):
        rest, discounted = rest + share, share + m * discounted
        built_up = (1.0 - rule.dampening) * (rest - m * discounted) / (1.0 - m)
        if m == 0.0:
            reach.append(rest)  # torch dampens only what goes into a momentum
        else:
            reach.append(rest + m * built_up if rule.nesterov else built_up)
    return reach[::-1]


def _point(
    own: Mapping[str, float], centre: Mapping[str, float], genes: Sequence[Gene], groups: Sequence[str]
) -> Point:
    rates = tuple(_ratio(RATE, own, centre, genes, group) for group in groups)
    decays = tuple(_ratio(DECAY, own, centre, genes, group) for group in groups)
    return Point(rates, tuple(rate * (decay - 1.0) for rate, decay in zip(rates, decays, strict=True)))


def _ratio(
    target: str, own: Mapping[str, float], centre: Mapping[str, float], genes: Sequence[Gene], group: str
) -> float:
    """A member's value of ``target`` in a group over the centre's; whatever the user's own value is cancels."""
    written = [gene for gene in genes if gene.target == target and (gene.groups is None or group in gene.groups)]
    if all(own[gene.name] == centre[gene.name] for gene in written):
        return 1.0
    absolute = [index for index, gene in enumerate(written) if not gene.relative]
    effective = written[absolute[-1] :] if absolute else written
    ratio = 1.0
    for gene in effective:
        ratio *= own[gene.name] / centre[gene.name]
    return ratio


def _mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Equal values are left as they are: equal members train as one, to the last bit."""
    return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)
