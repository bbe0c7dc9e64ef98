from __future__ import annotations

from clantune_scale.core.rounds import PhaseKind, RoundClock
from clantune_scale.core.strategies import build
from tests.core.strategies.facts import DROPOUT, FACTS, LR, facts, fitness_of


def test_rounds_have_one_length_and_fill_the_run():
    clock = RoundClock(build("control", facts(total_steps=89)).plan)
    assert [clock.round(i).num_steps for i in range(4)] == [20, 20, 20, 29]
    assert [clock.round(i).evolves for i in range(4)] == [True, True, True, False]


def test_members_stay_equal_and_the_weak_take_the_state_of_the_strong():
    control = build("control", facts(genes=(LR, DROPOUT)))
    population = control.init(fitness_of([3.0] * 4))
    decision = control.evolve(population, control.plan(0, 0), fitness_of([1.0, 2.0, 3.0, 4.0]))
    assert len(set(map(str, decision.population.genomes))) == 1
    assert decision.donors == (0, 1, 2, 0)


def test_it_competes_only_when_asked():
    plain, competing = build("control", FACTS), build("control", FACTS, {"competes": True})
    assert [p.kind for p in plain.plan(0, 0).phases] == [PhaseKind.COOPERATIVE]
    assert [p.num_steps for p in competing.plan(0, 0).phases] == [18, 2]
