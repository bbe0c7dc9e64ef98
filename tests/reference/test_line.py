"""The reference clan on the line against the reference clan whose members really train."""

from __future__ import annotations

import math

import pytest
import torch

from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import ConfigError
from clantune_scale.reference.clan import ReferenceClan
from tests.small_references import (
    DROPOUT,
    LR,
    averaged_weights,
    clan_of,
    network,
    samples,
    squared_error,
    strategy_of,
    weights,
)

DECAY = Gene("weight_decay", relative=True, max_change=0.3)
BETA = Gene("beta1", scale="logit", bounds=(0.5, 0.99), initial=0.9)
RACE = {"total": 120, "trial_cost": 0.6, "trial_at": 0.15}


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.004, weight_decay=0.1)


def falling(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)


def both(name: str, *genes: Gene, num_steps: int, module=network, changes=None, **options) -> list[ReferenceClan]:
    """Members in groups, and on the line."""
    clans = []
    for members in ("groups", "line"):
        settings = {"optimizer": adamw, "scheduler": falling, **(changes or {})}
        clan = clan_of(strategy_of(name, *genes, **options), module(), members=members, **settings)
        torch.manual_seed(0)
        clan.run(num_steps)
        clans.append(clan)
    return clans


def test_a_control_clan_on_the_line_is_the_plain_run_to_the_last_bit():
    changes = {"optimizer": adamw, "scheduler": falling, "clip": 0.05, "num_micro_batches": 2}
    clan = clan_of(strategy_of("control", LR), members="line", **changes)
    clan.run(20)

    plain = network()
    optimizer = adamw(plain.parameters())
    scheduler = falling(optimizer)
    for step in range(20):
        optimizer.zero_grad()
        for member in range(4):
            for micro in range(2):  # eight micro-batches, accumulated
                (squared_error(plain, samples(step, micro, member)) / 8).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), clan.members[0].parameters, strict=True))
    assert len(clan.members) == 1 and len(clan.lineage) == 3


def test_one_round_measures_what_real_members_measure():
    groups, line = both("clan", LR, num_steps=6)
    # Members' losses differ by 1.5e-2 of themselves, and what separates members from points is of second order in
    # that: seen 1.8e-5, nearly the same for all of them.
    assert line.lineage[0].losses == pytest.approx(groups.lineage[0].losses, rel=5e-5)
    assert max(groups.lineage[0].losses) > min(groups.lineage[0].losses) * 1.01
    assert line.lineage[0].donors == groups.lineage[0].donors
    after = line.evaluate(averaged=True)
    assert (after.losses == after.losses[0]).all()  # all go on from one state
    assert after.mean[0] == pytest.approx(min(line.lineage[0].losses), rel=1e-12)


@pytest.mark.parametrize("genes", [(LR,), (LR, DECAY)], ids=["rate", "rate and decay"])
def test_a_whole_run_decides_nearly_what_real_members_decide(genes):
    groups, line = both("clan", *genes, num_steps=120, total=120, changes={"clip": 1.0})
    # A move is the quotient of two small differences of losses, each of them right to about a thousandth, and moves
    # add up over six rounds. Seen: 0.001 for both genes.
    for gene in genes:
        ours, theirs = (clan.population.genomes[0].values[gene.name] for clan in (line, groups))
        assert abs(math.log(ours / theirs)) < 0.01
    progress = groups.evaluate().mean[0] - clan_of(strategy_of("control", LR)).evaluate().mean[0]
    assert line.evaluate().mean[0] == pytest.approx(groups.evaluate().mean[0], abs=0.02 * abs(progress))
    moved = math.log(groups.population.genomes[0].values["lr"])
    assert abs(moved) > 0.4  # otherwise there was nothing to agree on
    if DECAY in genes:
        assert any(line.clock.round(record.index).explores == ("weight_decay",) for record in line.lineage)


def test_a_trial_in_turns_is_the_trial_of_real_members():
    """Competitors never meet: up to the trial's end nothing but the cooperative rounds before it differs."""
    groups, line = both("clan", LR, num_steps=42, **RACE)
    trial = next(i for i, record in enumerate(line.lineage) if record.phases[0].kind is PhaseKind.COMPETITIVE)
    ours, theirs = line.lineage[trial], groups.lineage[trial]
    assert len(set(ours.losses)) == 4 and ours.donors == theirs.donors
    # Starts differ by the distance from the line after three rounds: seen 1e-4.
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert line.members[0].scheduler.last_epoch == line.num_steps
    assert int(line.members[0].optimizer.state_dict()["state"][0]["step"]) == line.num_steps


def test_turns_from_one_state_are_real_members_but_for_the_order_of_sums():
    """One cooperative step of equals comes before this trial; its average and the user's schedule are in every turn."""
    options = {"total": 400, "length": 20, "trial_cost": 0.3, "trial_at": 0.0026}
    groups, line = both("clan", LR, num_steps=41, **options)
    assert line.lineage[1].phases[0].kind is PhaseKind.COMPETITIVE
    # float64, forty steps of AdamW: seen 1e-13.
    assert line.lineage[1].losses == pytest.approx(groups.lineage[1].losses, rel=1e-11)
    for read in (weights, averaged_weights):
        torch.testing.assert_close(read(line.members[0]), read(groups.members[0]), rtol=0, atol=1e-11)


def test_specialized_genes_compete_in_turns_from_the_cooperative_end_and_are_rolled_back():
    _, line = both("clan", DROPOUT, num_steps=5, module=lambda: network(dropout=0.1))
    before = int(line.members[0].optimizer.state_dict()["state"][0]["step"])
    line.run(1)
    assert before == 4
    assert len(set(line.lineage[0].losses)) == 4
    assert int(line.members[0].optimizer.state_dict()["state"][0]["step"]) == 4
    assert line.members[0].optimizer.param_groups[0]["lr"] == pytest.approx(0.004 * 0.995**6)


def test_every_turn_sees_the_random_stream_that_one_turn_would_see():
    clan = clan_of(strategy_of("control", LR, competes=True), network(dropout=0.3), members="line")
    torch.manual_seed(0)
    clan.run(4)
    drawn = torch.get_rng_state()
    clan.run(2)
    after = torch.get_rng_state()
    torch.set_rng_state(drawn)
    for step in (4, 5):
        for micro in range(4):  # a turn reads the whole batch of four members
            squared_error(clan.members[0].module, samples(step, 0, micro))
    assert torch.equal(torch.get_rng_state(), after)
    assert len(set(clan.lineage[0].losses)) == 1  # equal members, equal batches, equal masks


def test_a_mean_of_members_is_a_point_too():
    groups, line = both("hdet", LR, num_steps=30, spread=0.3)
    assert groups.lineage[0].average is not None
    assert line.population.genomes[0].values["lr"] == pytest.approx(groups.population.genomes[0].values["lr"], rel=1e-2)
    torch.testing.assert_close(weights(line.members[0]), weights(groups.members[0]), rtol=0, atol=1e-2)


def test_the_guard_restores_the_one_model():
    start = weights(clan_of(strategy_of("clan", LR)).members[0])
    clan = clan_of(strategy_of("clan", LR, total=120), optimizer=lambda p: torch.optim.SGD(p, lr=30.0), members="line")
    clan.run(6)
    assert clan.decisions[0].rolls_back
    assert torch.equal(weights(clan.members[0]), start)


def test_the_training_loss_is_that_of_all_members_batches():
    groups, line = both("clan", LR, num_steps=5)
    assert line._read_training_loss() == pytest.approx(groups._read_training_loss(), rel=1e-3)


def test_what_one_model_cannot_do_is_refused_with_what_to_change():
    with pytest.raises(ConfigError, match="differ in 'beta1' while they cooperate.*set members to \"groups\""):
        clan_of(strategy_of("clan", BETA), members="line").run(1)
    with pytest.raises(ConfigError, match="differ in 'lr' before they compete"):
        clan_of(strategy_of("classic", LR), members="line").run(1)
    adam = {"optimizer": lambda p: torch.optim.Adam(p, weight_decay=0.1)}
    with pytest.raises(ConfigError, match="how the optimizer applies a weight decay is not known"):
        clan_of(strategy_of("clan", DECAY), members="line", **adam).run(1)
    with pytest.raises(ConfigError, match="members are to go on from different states"):
        clan_of(strategy_of("pbt", LR), members="line").run(40)
