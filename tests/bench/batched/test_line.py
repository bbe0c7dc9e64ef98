"""Batched clans on the line against the reference on the line, and against members that really train."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from clantune_scale.core.rounds import PhaseKind
from tests.bench.batched.small_model import NUM_EVAL_BATCHES
from tests.bench.batched.test_clans import (
    ADAMW,
    DROPOUT,
    LR,
    MOMENTUM,
    SGD,
    TOLERANCE,
    WEIGHT_DECAY,
    P,
    batched,
    reference,
    strategy_of,
)

TRIAL = {"total": 120, "trial_cost": 0.6, "trial_at": 0.15}


def assert_agree(clans, twins) -> None:
    """The one model of each twin is what all rows of its clan hold."""
    for index, twin in enumerate(twins):
        (one,) = twin.members
        for role, tensors in (("weights", one.parameters), ("average", one.average)):
            own = getattr(clans.state, role)[index]
            expected = torch.cat([tensor.detach().flatten() for tensor in tensors])
            torch.testing.assert_close(own, expected.expand(P, -1), **TOLERANCE)
        clan = clans.clans[index]
        assert [d and d.donors for d in clan.decisions] == [d and d.donors for d in twin.decisions]
        for own, expected in zip(clan.lineage, twin.lineage, strict=True):
            assert own.losses == pytest.approx(expected.losses, rel=1e-9)
        for own, expected in zip(clan.population.genomes, twin.population.genomes, strict=True):
            assert own.values == pytest.approx(expected.values, rel=1e-6)  # a parabola's minimum magnifies rounding


def run_both(name: str, settings, *genes, num_steps: int = 60, group_of=(), **options):
    """Two clans that differ in seed and rate, and a twin of each, compared wherever they cooperate."""
    own = [settings, replace(settings, lr=settings.lr / 3)]
    strategies = [strategy_of(name, *genes, seed=s, **options) for s in (3, 4)]
    clans = batched(strategies, own, members="line", group_of=group_of)
    twins = [
        reference(strategy_of(name, *genes, seed=s, **options), own[s - 3], s - 2, "line", group_of) for s in (3, 4)
    ]
    for step in range(num_steps):
        position = clans.clans[0].clock.at(step)
        clans.step()
        for twin in twins:
            twin.step()
        if position.phase.kind is PhaseKind.COOPERATIVE or position.ends_round:  # the twin's turns end with the phase
            assert_agree(clans, twins)
    return clans, twins


@pytest.mark.parametrize("settings", [ADAMW, replace(SGD, clip=0.5)], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("genes", [(LR,), (LR, WEIGHT_DECAY)], ids=["rate", "rate and decay"])
def test_the_line_of_rows_is_that_of_the_reference(settings, genes):
    clans, _ = run_both("clan", settings, *genes)
    moved = [clan.population.genomes[0].values["lr"] for clan in clans.clans]
    assert any(abs(math.log(value)) > 0.1 for value in moved)
    if len(genes) == 2:
        assert any(record.genomes[0].values["weight_decay"] != 1.0 for record in clans.clans[0].lineage)


def test_a_trial_is_that_of_the_references_turns():
    clans, _ = run_both("clan", ADAMW, LR, num_steps=48, **TRIAL)
    assert any(record.phases[0].kind is PhaseKind.COMPETITIVE for record in clans.clans[0].lineage)


def test_specialized_genes_and_means_of_members_are_those_of_the_reference():
    run_both("clan", replace(ADAMW, knobs={"dropout": 0.1}), DROPOUT, num_steps=24)
    run_both("hdet", SGD, LR, num_steps=24, spread=0.3)


def test_a_control_clan_on_the_line_is_one_in_groups_to_the_last_bit():
    groups, line = (batched([strategy_of("control", LR)] * 2, [ADAMW, ADAMW], members=m) for m in ("groups", "line"))
    for clans in (groups, line):
        clans.run(30)
    assert torch.equal(groups.state.weights, line.state.weights)


def test_members_on_the_line_decide_nearly_what_real_ones_do_and_cost_as_much():
    groups, line = (
        batched([strategy_of("clan", LR, WEIGHT_DECAY)] * 2, [ADAMW, ADAMW], members=m) for m in ("groups", "line")
    )
    for clans in (groups, line):
        clans.run(60)
    for ours, theirs in zip(line.clans, groups.clans, strict=True):
        assert (ours.num_trained, ours.num_evaluated) == (theirs.num_trained, theirs.num_evaluated)
        first, other = (clan.population.genomes[0].values["lr"] for clan in (ours, theirs))
        # Rates are high here, 0.02 with AdamW, and rounds of six steps few: seen 0.01.
        assert abs(math.log(first / other)) < 0.05


def test_rounds_that_one_model_cannot_stand_for_have_real_members():
    groups, line = (batched([strategy_of("clan", MOMENTUM)] * 2, [SGD, SGD], members=m) for m in ("groups", "line"))
    for clans in (groups, line):
        clans.run(12)
    assert torch.equal(groups.state.weights, line.state.weights)
    assert groups.clans[0].lineage[0].losses == line.clans[0].lineage[0].losses


def test_clans_of_a_batch_do_not_meet_on_the_line():
    both = batched([strategy_of("clan", LR, seed=s) for s in (3, 4)], [ADAMW, ADAMW], members="line")
    alone = batched([strategy_of("clan", LR, seed=4)], [ADAMW], seeds=(2,), members="line")
    for clans in (both, alone):
        clans.run(20)
    torch.testing.assert_close(both.state.weights[1], alone.state.weights[0], **TOLERANCE)


IN_GROUPS = tuple(replace(LR, name=f"lr:{group}", target="lr", groups=(group,)) for group in ("in", "out"))


@pytest.mark.parametrize("settings", [ADAMW, replace(SGD, clip=0.5)], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("slopes", [False, True], ids=["points", "slopes"])
def test_rates_of_groups_are_those_of_the_reference(settings, slopes):
    settings = replace(settings, group_rates={"in": 0.1})
    clans, twins = run_both("clan", settings, *IN_GROUPS, group_of=("in", "in", "out", "out"), group_slopes=slopes)
    for clan, twin in zip(clans.clans, twins, strict=True):
        assert clan.population.memory["centre"] == pytest.approx(twin.population.memory["centre"], abs=1e-6)
        rise = {name: value - math.log(0.7) for name, value in clan.population.memory["centre"].items()}
        assert len(set(rise.values())) == 2 and min(map(abs, rise.values())) > 0.1


def test_slopes_cost_two_backward_passes_over_the_window():
    plain, slopes = (
        batched([strategy_of("clan", *IN_GROUPS, group_slopes=own)], [ADAMW], (1,), "line", ("in", "in", "out", "out"))
        for own in (False, True)
    )
    for clans in (plain, slopes):
        clans.run(6)
    window = 6 * NUM_EVAL_BATCHES
    # Of P members, each one forward pass; a backward pass is two forward ones.
    assert plain.clans[0].num_evaluated == P * window
    assert slopes.clans[0].num_evaluated == (P + 4) * window
