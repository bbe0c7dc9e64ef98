"""Teams and averages in the reference clan."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.mutation import CLAN
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies import Decision, Population
from clantune_scale.core.strategies.control import Control
from clantune_scale.reference.clan import ReferenceClan
from tests.small_references import LR, averaged_weights, clan_of, network, samples, squared_error, strategy_of, weights


class InTeams(Control):
    """One competitive phase a round, in teams that its decisions change."""

    first: tuple[int, ...] | None = None
    then: tuple[int, ...] | None = None

    def plan(self, index: int, start_step: int) -> RoundPlan:
        return RoundPlan(index, start_step, (Phase(PhaseKind.COMPETITIVE, 3),))

    def init(self, start: Fitness) -> Population:
        return replace(super().init(start), teams=self.first)

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        return Decision(replace(population, teams=self.then), (0, 1, 2, 3))


def in_teams(first, then=None) -> ReferenceClan:
    strategy = InTeams(strategy_of("control", LR).facts)
    strategy.first, strategy.then = first, then
    return clan_of(strategy)


def test_a_team_is_one_plain_optimizer_on_its_joined_batch_and_a_loner_on_its_own():
    clan = in_teams((7, 3, 7, 7))
    clan.run(3)
    for crew, size in (((0, 2, 3), 3), ((1,), 1)):
        plain = network()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.0)
        for step in range(3):
            parts = [samples(step, 0, place) for place in range(size)]
            optimizer.zero_grad()
            squared_error(plain, [torch.cat(column) for column in zip(*parts, strict=True)]).backward()
            optimizer.step()
        expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
        for member in crew:
            # float64: what remains is the order of summation through 3 Adam steps.
            torch.testing.assert_close(weights(clan.members[member]), expected, rtol=0, atol=1e-13)


def test_one_team_of_all_is_data_parallelism_to_the_last_bit():
    together = (0, 0, 0, 0)
    clan, plain = in_teams(together, then=together), clan_of(strategy_of("control", LR, length=3))
    clan.run(6)
    plain.run(6)
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(clan.members, plain.members, strict=True))


def test_members_regroup_when_a_decision_says_so_and_the_lineage_remembers():
    clan = in_teams(None, then=(0, 0, 1, 1))
    clan.run(6)
    assert [record.phases[0].teams for record in clan.lineage] == [None, (0, 0, 1, 1)]
    assert clan.clock.at(6).phase.teams == (0, 0, 1, 1)


def test_an_average_is_taken_by_all_weights_and_averaged_weights_alike_and_by_no_moments():
    class Averaging(Control):
        uses_ema = True

        def plan(self, index: int, start_step: int) -> RoundPlan:
            return RoundPlan(index, start_step, (Phase(PhaseKind.COMPETITIVE, 3),), (), True, 3)

        def init(self, start: Fitness) -> Population:
            return Population(tuple(Genome({"lr": 1.0 + m}, {}) for m in range(4)))

        def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
            return Decision(population, (0, 1, 2, 3), mixing_weights=(0.5, 0.25, 0.25, 0.0))

    clan = clan_of(Averaging(strategy_of("control", LR).facts))
    clan.run(2)
    twin = copy.deepcopy(clan)
    twin.members[3].parameters[0].data.fill_(math.nan)
    twin.run(1)
    clan.strategy = InTeams(clan.strategy.facts)  # the same training without the average
    clan.run(1)
    expected, averaged = (
        0.5 * first + 0.25 * second + 0.25 * third
        for first, second, third, _ in (map(weights, clan.members), map(averaged_weights, clan.members))
    )
    for member, before in zip(twin.members, clan.members, strict=True):
        assert torch.equal(weights(member), expected)
        assert torch.equal(averaged_weights(member), averaged)
        if member is not twin.members[3]:
            moments, own = (m.optimizer.state_dict()["state"] for m in (member, before))
            assert all(torch.equal(moments[i]["exp_avg"], own[i]["exp_avg"]) for i in own)
    first, second, *_ = (member.optimizer.state_dict()["state"][0]["exp_avg"] for member in twin.members)
    assert not torch.equal(first, second)
    assert twin.lineage.ancestry(2) == (CLAN,)
