"""The published strategies in the reference clan, end to end."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from clantune_scale.core.mutation import CLAN
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.reference.clan import ReferenceClan
from tests.small_references import (
    DROPOUT,
    LR,
    clan_of,
    network,
    samples,
    squared_error,
    strategy_of,
    weights,
)

#: By name, options that suit a run of 60 steps in rounds of 6.
SHORT = {
    "pbt": {},
    "hdet": {"spread": 0.3, "pull": 0.0},
    "halving": {"budgets": [0.1, 0.1, 0.2, 0.6], "factor": 8},
}


def trained(name: str, *, num_steps: int = 60, **changes) -> ReferenceClan:
    clan = clan_of(strategy_of(name, LR, DROPOUT, total=60, **SHORT[name]), network(dropout=0.1), **changes)
    torch.manual_seed(0)
    clan.run(num_steps)
    return clan


@pytest.mark.parametrize("name", SHORT)
def test_it_trains_the_same_from_the_same_seed(name):
    first, second = trained(name), trained(name)
    assert first.decisions == second.decisions
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(first.members, second.members, strict=True))
    assert first.evaluate().mean.min() < 0.7 * clan_of(first.strategy, network()).evaluate().mean[0]
    assert all(math.isfinite(loss) for record in first.lineage for loss in record.losses)


def test_members_of_pbt_read_the_clans_whole_batch_and_train_apart():
    read = []

    def counting(step, member, micro, plan):
        read.append((step, member, micro))
        return samples(step, micro)

    clan = trained("pbt", num_steps=6, batch=counting)
    assert len([1 for step, member, _ in read if (step, member) == (0, 1)]) == 4
    assert len({tuple(weights(member).tolist()) for member in clan.members}) > 1
    weakest = clan.lineage[0].losses.index(max(clan.lineage[0].losses))
    donor = clan.decisions[0].donors[weakest]
    assert torch.equal(weights(clan.members[weakest]), weights(clan.members[donor]))
    assert clan.population.genomes[weakest].values != clan.lineage[0].genomes[donor].values


def test_hdet_ends_each_round_with_everyone_at_the_mean_and_the_clan_as_ancestor():
    clan = clan_of(strategy_of("hdet", LR, total=60, **SHORT["hdet"]))
    clan.run(5)
    rates = [genome.values["lr"] for genome in clan.population.genomes]
    clan.run(1)
    assert len(set(clan.lineage[0].losses)) == 4  # measured apart
    first, *others = clan.members
    assert all(torch.equal(weights(member), weights(first)) for member in others)
    clan.run(54)
    assert all(torch.equal(weights(member), weights(first)) for member in others)  # at the run's end too
    assert clan.lineage.ancestry(2) == (CLAN,) * 10
    schedule = ClanSchedule.from_lineage(clan.lineage, [LR], member=2)
    assert schedule.value_at("lr", 0) == pytest.approx(math.prod(rates) ** 0.25)
    assert clan.population.memory["base"]["lr"] != 1


def test_hdet_outlives_a_member_that_is_not_finite():
    clan = clan_of(strategy_of("hdet", LR, total=60, **SHORT["hdet"]))
    clan.run(5)
    with torch.no_grad():
        clan.members[1].parameters[0].fill_(math.nan)
        clan.members[1].optimizer.state_dict()["state"][0]["exp_avg"].fill_(math.nan)
    # Its gradient would reach all others in the step that comes: the distributed clan leaves it out of the mean.
    clan._share_gradients = lambda team: ReferenceClan._share_gradients(clan, [clan.members[m] for m in (0, 2, 3)])
    clan.run(1)
    del clan._share_gradients
    assert clan.lineage[0].losses[1] is None
    assert all(math.isfinite(genome.values["lr"]) for genome in clan.population.genomes)
    clan.run(54)
    assert all(torch.isfinite(weights(member)).all() for member in clan.members)
    assert clan.evaluate().mean.max() < clan.lineage[0].losses[0]


def test_the_last_team_of_halving_is_data_parallelism_from_the_winners_state():
    clan = clan_of(strategy_of("halving", LR, total=60, **SHORT["halving"]))
    clan.run(24)
    assert [len(set(record.phases[0].teams)) for record in clan.lineage] == [4, 4, 2, 2]
    assert clan.clock.at(24).phase.kind is PhaseKind.COOPERATIVE
    assert len({genome.digest() for genome in clan.population.genomes}) == 1
    first, *others = clan.members
    assert all(torch.equal(weights(member), weights(first)) for member in others)

    plain = network()
    plain.load_state_dict(first.module.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.0)
    optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    rate = clan.population.genomes[0].values["lr"]
    for step in range(24, 34):
        optimizer.param_groups[0]["lr"] = 0.02 * rate * (60 - step) / 36
        parts = [samples(step, 0, member) for member in range(4)]
        optimizer.zero_grad()
        squared_error(plain, [torch.cat(column) for column in zip(*parts, strict=True)]).backward()
        optimizer.step()
    clan.run(10)
    expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
    # float64: what remains is the order of summation through 10 Adam steps.
    torch.testing.assert_close(weights(first), expected, rtol=0, atol=1e-12)
