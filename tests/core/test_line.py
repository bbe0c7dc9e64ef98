from __future__ import annotations

import pytest

from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.line import (
    DecayRule,
    Line,
    averaging_weight,
    averaging_weights,
    decay_reach,
    kept_share,
    obstacle,
    only_the_last,
    reads,
    successor,
)
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population

LR = Gene("lr", relative=True)
DECAY = Gene("weight_decay", relative=True)
HEAD = Gene("lr:head", relative=True, target="lr", groups=("head",))
ABSOLUTE = Gene("lr:absolute", target="lr", groups=("head",))
BETA = Gene("beta1", scale="logit", bounds=(0.5, 0.99), initial=0.9)
DROPOUT = Gene("dropout", kind="specialized", scale="linear", bounds=(0.0, 0.5), initial=0.1)
COOPERATIVE, COMPETITIVE = (Phase(kind, 6) for kind in PhaseKind)


def genomes(**values: tuple[float, ...]) -> list[Genome]:
    named = {name.replace("_head", ":head"): own for name, own in values.items()}
    return [Genome(dict(zip(named, column, strict=True))) for column in zip(*named.values(), strict=True)]


def plan(*phases: Phase, start: int = 9, window: int = 4) -> RoundPlan:
    return RoundPlan(1, start, phases or (COOPERATIVE,), uses_ema=True, ema_window_steps=window)


def test_the_centre_is_the_arithmetic_mean_so_that_members_mean_lies_there():
    line = Line.of(genomes(lr=(0.5, 1.0, 3.0)), [LR], ["0"])
    assert line.centre == {"lr": 1.5}
    assert sum(point.rates[0] for point in line.points) == pytest.approx(3.0)
    assert line.varies_rate and not line.varies_decay


def test_equal_members_are_the_centre_to_the_last_bit():
    line = Line.of(genomes(lr=(0.1,) * 3, dropout=(0.1, 0.2, 0.3)), [LR, DROPOUT], ["0"])
    assert line.centre["lr"] == 0.1
    assert all(point.is_centre for point in line.points)


def test_rates_multiply_in_the_groups_they_are_written_to_and_an_absolute_one_replaces_what_came_before():
    own = genomes(lr=(1.0, 3.0), lr_head=(0.5, 1.5))
    points = Line.of(own, [LR, HEAD], ["body", "head"]).points
    assert points[0].rates == (0.5, 0.25)
    assert points[1].rates == (1.5, 2.25)
    own = [Genome({"lr": lr, "lr:absolute": 2.0}) for lr in (1.0, 3.0)]
    assert Line.of(own, [LR, ABSOLUTE], ["body", "head"]).points[0].rates == (0.5, 1.0)


def test_a_decay_counts_times_the_rate_that_it_is_applied_with():
    line = Line.of(genomes(lr=(0.5, 1.5), weight_decay=(3.0, 1.0)), [LR, DECAY], ["0"])
    assert line.points[0].decays == (0.5 * 0.5,)
    assert line.points[1].decays == (1.5 * -0.5,)


def test_a_mean_of_points_is_a_point():
    line = Line.of(genomes(lr=(0.5, 1.5)), [LR], ["0"])
    assert line.mixed((0.25, 0.75)).rates == (1.25,)
    assert line.mixed((0.0, 1.0)) is line.points[1]


@pytest.mark.parametrize(
    ("phases", "values", "genes", "reason"),
    [
        ((COOPERATIVE,), {"lr": (1.0, 2.0), "weight_decay": (1.0, 2.0)}, [LR, DECAY], None),
        ((COOPERATIVE,), {"beta1": (0.8, 0.9)}, [BETA], "differ in 'beta1' while they cooperate"),
        ((COOPERATIVE,), {"dropout": (0.1, 0.2)}, [DROPOUT], None),  # the clan's while it cooperates
        ((COOPERATIVE, COMPETITIVE), {"dropout": (0.1, 0.2)}, [DROPOUT], None),
        ((COOPERATIVE, COMPETITIVE), {"lr": (1.0, 2.0)}, [LR], "differ in 'lr' before they compete"),
        ((COMPETITIVE,), {"lr": (1.0, 2.0), "beta1": (0.8, 0.9)}, [LR, BETA], None),
        ((COMPETITIVE, COOPERATIVE), {"lr": (1.0, 2.0)}, [LR], "a phase follows a competitive one"),
    ],
)
def test_which_rounds_one_model_can_stand_for(phases, values, genes, reason):
    found = obstacle(plan(*phases), genomes(**values), genes)
    assert found is None if reason is None else reason in found


def test_a_decay_whose_way_to_the_weights_is_not_known_is_an_obstacle_only_if_it_varies():
    same, apart = genomes(weight_decay=(1.0, 1.0)), genomes(weight_decay=(1.0, 2.0))
    assert obstacle(plan(), same, [DECAY], knows_decay=False) is None
    assert "is not known" in str(obstacle(plan(), apart, [DECAY], knows_decay=False))


def test_who_all_members_go_on_from():
    population = Population(genomes(lr=(1.0,) * 3))
    assert successor(Decision(population, (1, 1, 1))) == (0.0, 1.0, 0.0)
    assert successor(Decision(population, (0, 1, 2))) is None
    average = Decision(population, (1, 1, 2), mixing_weights=(0.25, 0.25, 0.5))
    assert successor(average) == (0.0, 0.5, 0.5)


@pytest.mark.parametrize("every", [1, 2, 4, 100])
def test_an_average_is_its_start_and_the_weights_that_it_reads(every):
    own = plan()
    average, weights = 5.0, [1.0, -2.0, 3.0, 0.5, 7.0, 2.0]
    shares = reads(own, every=every)
    expected = kept_share(own) * average + sum(a * b for a, b in zip(shares, weights, strict=True))
    moves = averaging_weights(own, every=every)
    for offset, weight in enumerate(weights):
        if every == 1:
            assert moves[offset] == pytest.approx(averaging_weight(10 + offset, 4), rel=1e-14)
        average += (weight - average) * moves[offset]
    assert average == pytest.approx(expected, rel=1e-14)
    assert kept_share(own) + sum(shares) == pytest.approx(1.0, rel=1e-14)
    assert [bool(move) for move in moves] == [(i + 1) % every == 0 or i == 5 for i in range(6)]


@pytest.mark.parametrize(
    "rule", [DecayRule(), DecayRule(0.9), DecayRule(0.9, 0.3), DecayRule(0.8, nesterov=True)], ids=str
)
@pytest.mark.parametrize("averaged", [False, True])
def test_how_far_a_decay_reaches_is_what_the_recursion_of_momentum_says(rule, averaged):
    """torch's recursion: buffer <- m buffer + (1 - dampening) g; the update is buffer, or g + m buffer."""
    own = plan()
    for first in range(own.num_steps):
        buffer, moved, average = 0.0, 0.0, 0.0
        for step in range(own.num_steps):
            given = float(step == first)
            buffer = rule.momentum * buffer + (1 - rule.dampening) * given
            update = given + rule.momentum * buffer if rule.nesterov else buffer
            moved += update if rule.momentum else given
            average += (moved - average) * averaging_weight(own.start_step + step + 1, 4)
        read = reads(own) if averaged else only_the_last(own)
        assert decay_reach(read, rule)[first] == pytest.approx(average if averaged else moved, rel=1e-12)
