from __future__ import annotations

import pytest

from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind, RoundClock
from clantune_scale.core.strategies import build
from tests.core.strategies.facts import DROPOUT, FACTS, LR, WEIGHT_DECAY, facts, fitness_of

NO_RACE = {"trial_cost": 0.0}


def plans(clan, total=1000):
    clock, found = RoundClock(clan.plan), []
    while not found or found[-1].end_step < total:
        found.append(clock.round(len(found)))
    return found


def test_rounds_grow_with_the_age_of_the_run_until_the_freeze():
    before = [p for p in plans(build("clan", FACTS, NO_RACE)) if p.start_step < 400]
    assert [p.num_steps for p in before] == [20, 20, 20, 20, 20, 25, 31, 39, 48, 60, 97]
    assert before[-1].end_step == 400
    assert all(p.evolves and p.uses_ema and p.explores == ("lr",) for p in before)
    assert [p.ema_window_steps for p in before[:1] + before[-1:]] == [12, 58]


def test_one_round_is_a_race_on_the_whole_batch_each_whose_cost_sets_its_length():
    found = plans(build("clan", FACTS))
    assert [p.num_steps for p in found[:6]] == [20, 20, 20, 10, 27, 24]
    (phase,) = found[4].phases
    assert (phase.kind, phase.keeps, phase.batch_factor) == (PhaseKind.COMPETITIVE, True, 4)
    assert (found[4].uses_ema, found[4].ema_window_steps, found[4].explores) == (True, 16, ("lr",))
    assert sum(phase.kind is PhaseKind.COMPETITIVE for p in found for phase in p.phases) == 1


def test_a_larger_clan_races_in_teams_and_a_round_longer_than_the_run_before_the_race_is_cut():
    found = plans(build("clan", facts(population_size=8, round_length_steps=200)))
    assert [p.end_step for p in found[:2]] == [70, 97]
    (phase,) = found[1].phases
    assert (phase.teams, phase.batch_factor) == ((0, 0, 1, 1, 2, 2, 3, 3), 4)


@pytest.mark.parametrize(
    "run",
    [facts(population_size=2), facts(total_steps=600), facts(genes=(WEIGHT_DECAY,))],
    ids=["clan of two", "too short", "no rate"],
)
def test_where_a_race_could_show_nothing_there_is_none(run):
    clan = build("clan", run)
    assert not any(p.kind is PhaseKind.COMPETITIVE for plan in plans(clan) for p in plan.phases)


def test_two_members_who_can_only_creep_start_as_configured():
    start = build("clan", facts(population_size=2)).init(fitness_of([4.0] * 2))
    assert start.memory["centre"] == {"lr": 0.0}


def test_a_run_of_unknown_length_races_as_one_of_sixty_rounds():
    unknown, sixty = (plans(build("clan", facts(total_steps=total)))[:6] for total in (None, 60 * 20))
    assert [p.phases for p in unknown] == [p.phases for p in sixty]
    assert any(phase.kind is PhaseKind.COMPETITIVE for p in unknown for phase in p.phases)


def test_after_the_freeze_progress_is_reported_a_moderate_number_of_times_and_the_last_one_may_go_back():
    after = [p for p in plans(build("clan", FACTS)) if p.start_step >= 400]
    assert [p.num_steps for p in after] == [60] * 10
    assert not any(p.explores for p in after)
    assert [p.evolves for p in after] == [False] * 9 + [True]
    assert {p.ema_window_steps for p in after} == {72}  # a champion's average is of the last steps
    assert all(phase.kind is PhaseKind.COOPERATIVE for p in after for phase in p.phases)


def test_until_the_race_only_learning_rates_are_explored():
    found = plans(build("clan", facts(genes=(WEIGHT_DECAY, LR, DROPOUT))))
    is_trial_gene = next(i for i, p in enumerate(found) if p.phases[0].kind is PhaseKind.COMPETITIVE)
    assert {p.explores for p in found[: is_trial_gene + 1]} == {("lr",)}
    assert {name for p in found[is_trial_gene + 1 :] for name in p.explores} == {"lr", "weight_decay", "dropout"}


def test_a_clan_of_four_explores_one_gene_at_a_time_in_rotation():
    found = plans(build("clan", facts(genes=(LR, WEIGHT_DECAY)), NO_RACE))
    assert [p.explores for p in found[:4]] == [("lr",), ("weight_decay",), ("lr",), ("weight_decay",)]


def test_a_larger_clan_explores_as_many_genes_as_parabolas_can_be_solved_for():
    genes = (LR, WEIGHT_DECAY, Gene("eps"), Gene("clip"))
    found = plans(build("clan", facts(genes=genes, population_size=7), NO_RACE))
    assert [p.explores for p in found[:3]] == [
        ("lr", "weight_decay", "eps"),
        ("clip", "lr", "weight_decay"),
        ("eps", "clip", "lr"),
    ]


def test_specialized_rounds_alternate_end_with_a_competition_that_is_rolled_back_and_are_averaged_over_it():
    found = plans(build("clan", facts(genes=(LR, DROPOUT), duty_cycle=0.2), NO_RACE))
    assert [p.explores for p in found[:4]] == [("lr",), ("dropout",), ("lr",), ("dropout",)]
    assert len(found[0].phases) == 1
    cooperative, competitive = found[1].phases
    assert (cooperative.num_steps, competitive.num_steps) == (16, 4)
    assert (competitive.kind, competitive.keeps) == (PhaseKind.COMPETITIVE, False)
    assert (found[1].uses_ema, found[1].ema_window_steps) == (True, 2)


def test_the_run_never_ends_in_competition():
    found = plans(build("clan", facts(genes=(DROPOUT,)), {"freeze_at": 1.0}))
    assert len(found[0].phases) == 2
    assert [phase.kind for phase in found[-1].phases] == [PhaseKind.COOPERATIVE]
    assert not found[-1].evolves


def test_without_a_duty_cycle_specialized_genes_stay_still():
    found = plans(build("clan", facts(genes=(LR, DROPOUT), duty_cycle=0.0)))
    assert {name for p in found for name in p.explores} == {"lr"}


def test_nothing_is_explored_without_genes_or_without_company():
    for run in (facts(genes=()), facts(population_size=1)):
        clan = build("clan", run)
        assert not any(p.explores or p.evolves for p in plans(clan))
        assert not clan.guards and not clan.uses_ema  # nothing to keep a copy for
    assert build("clan", FACTS).guards and build("clan", FACTS).uses_ema


def test_a_run_of_unknown_length_never_freezes_or_decays():
    clan = build("clan", facts(total_steps=None))
    assert all(p.evolves for p in plans(clan, 10_000))
    assert clan.lr_factor(10_000) == 1.0


@pytest.mark.parametrize(
    ("options", "start", "factors"),
    [
        ({}, 400, [1.0, 1.0, 0.5, 1 / 600, 0.0]),
        ({"decay": "none"}, None, [1.0] * 5),
        ({"freeze_at": 1.0}, None, [1.0] * 5),
    ],
)
def test_rates_decay_from_the_freeze_to_zero_unless_the_user_does_that(options, start, factors):
    clan = build("clan", FACTS, options)
    assert clan.decay_start_step == start
    assert [clan.lr_factor(step) for step in (0, 400, 700, 999, 1200)] == pytest.approx(factors)


def test_a_clock_may_ask_beyond_the_end():
    clan = build("clan", FACTS)
    assert RoundClock(clan.plan).at(1000).plan.start_step == 1000
