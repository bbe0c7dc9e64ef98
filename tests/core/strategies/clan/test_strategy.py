from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import build
from clantune_scale.core.strategies.clan.guard import Guard
from clantune_scale.errors import EvaluationError
from tests.core.strategies.facts import DROPOUT, FACTS, LR, WEIGHT_DECAY, facts, fitness_of

START = fitness_of([4.0] * 4)
#: For tests of what rounds ask for, without the belief in the configured rate.
NO_PRIOR = {"prior": 1.0}
#: For tests of the line search alone.
NO_RACE = {"trial_cost": 0.0, "start_factor": 1.0, **NO_PRIOR}
WHOLE = Gene("accumulation", kind="specialized", bounds=(1, 64), initial=4.0, step_size=0.01, integer=True)


def centre_after(clan, losses_of, index=0, start_step=0):
    """The decision of a round whose members' losses are a function of their explored offsets."""
    population = clan.init(START)
    plan = clan.plan(index, start_step)
    losses = [losses_of(genome.values) for genome in population.genomes]
    return clan.evolve(population, plan, fitness_of(losses))


def test_members_spread_around_the_configured_value():
    population = build("clan", FACTS, NO_RACE).init(START)
    offsets = np.array([math.log(genome.values["lr"]) for genome in population.genomes])
    assert offsets.mean() == pytest.approx(0.0, abs=1e-12)
    assert offsets.std() == pytest.approx(LR.step_size)


def test_the_centre_moves_to_the_minimum_and_everyone_takes_the_fittest_ones_state():
    decision = centre_after(build("clan", FACTS, NO_RACE), lambda values: 3.0 + (math.log(values["lr"]) + 0.3) ** 2)
    assert decision.population.memory["centre"]["lr"] == pytest.approx(-0.3)
    assert len(set(decision.donors)) == 1
    donor = decision.donors[0]
    assert decision.reasons[donor] == "fittest; lr -0.300 (minimum)"
    offsets = np.array([math.log(genome.values["lr"]) for genome in decision.population.genomes]) + 0.3
    assert offsets.mean() == pytest.approx(0.0, abs=1e-9)


def test_a_rate_rises_to_the_minimum_along_the_displacement_and_another_gene_to_its_own():
    def bowl(values):
        return 3.0 + sum((math.log(value) - 0.3) ** 2 for value in values.values())

    rate, other = (Gene(name, relative=True) for name in ("lr", "eps"))
    clans = [build("clan", facts(genes=(gene,)), NO_RACE) for gene in (rate, other)]
    moved = [centre_after(clan, bowl).population.memory for clan in clans]
    # f' = -0.6 and f'' = 2 over log k make the minimum of the parabola in k 1 + 0.6 / 2.6.
    assert moved[0]["centre"]["lr"] == pytest.approx(math.log(1 + 0.6 / 2.6), abs=1e-9)
    assert moved[1]["centre"]["eps"] == pytest.approx(0.3)


def test_the_centre_stops_at_the_bounds():
    gene = Gene("lr", bounds=(0.5, 1.2))
    decision = centre_after(build("clan", facts(genes=(gene,)), NO_PRIOR), lambda values: 3.0 - math.log(values["lr"]))
    assert math.exp(decision.population.memory["centre"]["lr"]) == pytest.approx(1.2)
    assert all(0.5 <= genome.values["lr"] <= 1.2 for genome in decision.population.genomes)


def test_memory_is_plain_json_so_that_a_resume_decides_the_same():
    clan = build("clan", FACTS)
    population = clan.init(START)
    memory = json.loads(json.dumps(population.memory))
    fitness, plan = fitness_of([3.0, 3.2, 3.1, 3.5]), clan.plan(0, 0)
    assert clan.evolve(type(population)(population.genomes, memory), plan, fitness) == clan.evolve(
        population, plan, fitness
    )


@pytest.mark.parametrize(
    ("losses", "training"),
    [([5.0, 6.0, 5.5, 5.2], 5.1), ([math.nan] * 4, None)],
    ids=["training blew up", "not finite"],
)
def test_a_rollback_divides_learning_rates_by_three_and_moves_nothing_else(losses, training):
    clan = build("clan", facts(genes=(LR, WEIGHT_DECAY)), NO_RACE)
    decision = clan.evolve(clan.init(START), clan.plan(0, 0), fitness_of(losses, training_loss=training))
    assert decision.rolls_back
    assert decision.donors == (0, 1, 2, 3)
    centre = decision.population.memory["centre"]
    assert (centre["lr"], centre["weight_decay"]) == (pytest.approx(-math.log(3)), 0.0)


def test_the_guard_tolerates_a_tenth_of_the_progress():
    clan = build("clan", FACTS)
    first = clan.evolve(clan.init(START), clan.plan(0, 0), fitness_of([2.0, 2.1, 2.2, 2.3]))
    plan = clan.plan(1, 20)  # progress 2.0 so far: 0.2 may be lost
    tolerated = clan.evolve(first.population, plan, fitness_of([2.19, 2.6, 2.6, 2.6]))
    assert tolerated.takes_snapshot
    assert best_loss(tolerated) == 2.0  # or ground would be lost bit by bit
    assert not clan.evolve(first.population, plan, fitness_of([2.21, 2.6, 2.6, 2.6])).takes_snapshot


def best_loss(decision, kind="optimizer"):
    return Guard.from_memory(decision.population.memory["guard"]).best_loss(kind)


def test_a_single_round_may_lose_ground_by_chance():
    clan = build("clan", FACTS, NO_RACE)
    good, bad = fitness_of([2.0, 2.1, 2.2, 2.3]), fitness_of([3.0, 3.1, 3.2, 3.3])
    decision, restored = clan.evolve(clan.init(START), clan.plan(0, 0), good), []
    for index, fitness in enumerate([bad, good, bad, bad, good], start=1):
        decision = clan.evolve(decision.population, clan.plan(index, 20 * index), fitness)
        restored.append(decision.rolls_back)
        assert decision.takes_snapshot is (fitness is good or decision.rolls_back)
    assert restored == [False, False, False, True, False]


def test_two_rollbacks_and_then_the_clan_takes_what_lower_rates_did_not_mend():
    clan = build("clan", FACTS, NO_RACE)
    bad = fitness_of([3.0, 3.1, 3.2, 3.3])  # of an initial 4.0 and a best 2.0: half of the progress is lost
    decision = clan.evolve(clan.init(START), clan.plan(0, 0), fitness_of([2.0, 2.1, 2.2, 2.3], training_loss=3.0))
    restored = []
    for index in range(1, 5):
        decision = clan.evolve(decision.population, clan.plan(index, 20 * index), bad)
        restored.append(decision.rolls_back)
    assert restored == [False, True, True, False]
    assert not decision.takes_snapshot  # the rollback snapshot stays the good state
    assert best_loss(decision) == 2.0
    assert decision.population.memory["centre"]["lr"] < -2 * math.log(3) + 0.9  # and rates as low as they were put
    population = decision.population
    assert not clan.evolve(population, clan.plan(5, 100), bad).rolls_back
    # A validation loss above the first one is no blow-up, and neither does a blow-up get a third rollback.
    for training in (None, 2.0, 5.0):
        above = fitness_of([4.1, 4.2, 4.3, 4.4], training_loss=training)
        assert not clan.evolve(population, clan.plan(4, 80), above).rolls_back
    assert clan.evolve(population, clan.plan(4, 80), fitness_of([math.nan] * 4)).rolls_back
    better = clan.evolve(population, clan.plan(4, 80), fitness_of([1.7, 2.0, 2.1, 2.2]))
    assert better.population.memory["guard"]["rollbacks"] == 0 and better.takes_snapshot


@pytest.mark.parametrize(("training", "falls"), [(3.0, False), (3.9, False), (4.1, True), (None, True)])
def test_no_rate_falls_after_a_round_that_lost_ground_while_training_got_on(training, falls):
    clan = build("clan", FACTS, NO_RACE)
    population = clan.init(START)
    losses = [4.5 + math.log(genome.values["lr"]) for genome in population.genomes]  # lower rates look better
    decision = clan.evolve(population, clan.plan(0, 0), fitness_of(losses, training_loss=training))
    assert not decision.rolls_back and not decision.takes_snapshot
    assert (decision.population.memory["centre"]["lr"] < 0) is falls


def test_specialized_rounds_are_compared_with_their_own_kind():
    clan = build("clan", facts(genes=(LR, DROPOUT)), NO_RACE)  # before a race no round is specialized
    first = clan.evolve(clan.init(START), clan.plan(0, 0), fitness_of([2.0, 2.1, 2.2, 2.3]))
    second = clan.evolve(first.population, clan.plan(1, 20), fitness_of([3.0, 3.1, 3.2, 3.3], training_loss=50.0))
    assert second.takes_snapshot and not second.rolls_back
    assert (best_loss(second), best_loss(second, "specialized")) == (2.0, 3.0)


def test_a_training_loss_of_members_that_trained_apart_is_no_blow_up():
    """In a race one member may diverge at its own high rate, and takes the mean training loss with it."""
    clan = build("clan", FACTS)
    plan, population = race_of(clan)
    decision = clan.evolve(population, plan, fitness_of([2.5, 2.6, 2.7, 80.0], training_loss=20.0))
    assert not decision.rolls_back and not decision.takes_snapshot


def test_a_resumed_clan_rolls_back_as_one_that_never_stopped():
    """Memory passes JSON before every round; losses rise, recover, rise twice, and blow up."""
    clan = build("clan", facts(sees_samples_once=True), NO_RACE)
    losses = [(3.0, 3.1), (3.6, 3.2), (2.9, 3.0), (3.7, 3.1), (3.8, 3.1), (3.6, 3.1), (9.0, 7.0), (math.nan, None)]
    through = direct = clan.init(START)
    restored = []
    for index, (loss, training) in enumerate(losses):
        fitness, plan = fitness_of([loss + 0.01 * m for m in range(4)], training_loss=training), clan.plan(index, 20)
        decision = clan.evolve(direct, plan, fitness)
        again = replace(through, memory=json.loads(json.dumps(through.memory)))
        assert clan.evolve(again, plan, fitness) == decision
        direct, through = decision.population, decision.population
        restored.append(decision.rolls_back)
    assert restored == [False, False, False, False, True, True, False, True]


def test_nothing_finite_and_no_rate_to_lower_is_an_error():
    clan = build("clan", facts(genes=(WEIGHT_DECAY,)))
    with pytest.raises(EvaluationError, match="round 0: no member's validation loss is finite, and there is no"):
        clan.evolve(clan.init(START), clan.plan(0, 0), fitness_of([math.nan] * 4))
    floor = build("clan", facts(genes=(Gene("lr", bounds=(1.0, 2.0)),)))
    with pytest.raises(EvaluationError, match="above its lower bound"):
        floor.evolve(floor.init(START), floor.plan(0, 0), fitness_of([math.nan] * 4))


def test_a_start_that_is_not_finite_is_an_error():
    with pytest.raises(EvaluationError, match="before the first step is not finite"):
        build("clan", FACTS).init(fitness_of([math.nan] * 4))


def test_some_members_not_finite_never_donate():
    clan = build("clan", FACTS)
    decision = clan.evolve(clan.init(START), clan.plan(0, 0), fitness_of([math.nan, 3.0, math.inf, 2.0]))
    assert decision.donors == (3, 3, 3, 3)


def test_after_the_freeze_everyone_carries_the_centre():
    clan = build("clan", FACTS)
    index, plan = next((i, p) for i, p in enumerate(rounds(clan)) if p.end_step == 400)
    decision = clan.evolve(clan.init(START), plan, fitness_of([2.0, 2.1, 2.3, 2.2]))
    values = {genome.values["lr"] for genome in decision.population.genomes}
    assert values == {math.exp(decision.population.memory["centre"]["lr"])}
    assert index > 0


def test_whole_number_genes_differ_by_at_least_one():
    clan = build("clan", facts(genes=(WHOLE,)))
    expressed = {WHOLE.expressed(genome.values["accumulation"]) for genome in clan.init(START).genomes}
    assert len(expressed) >= 3  # a parabola needs three


def test_whole_number_genes_are_judged_by_the_value_that_took_effect():
    clan = build("clan", facts(genes=(WHOLE,)))
    decision = centre_after(clan, lambda v: 3.0 + (math.log(WHOLE.expressed(v["accumulation"])) - math.log(5)) ** 2)
    assert math.exp(decision.population.memory["centre"]["accumulation"]) == pytest.approx(5.0)


def test_members_are_reflected_at_the_bounds_and_do_not_pile_up_on_them():
    gene = Gene("lr", bounds=(0.5, 1.0))
    values = [genome.values["lr"] for genome in build("clan", facts(genes=(gene,)), NO_RACE).init(START).genomes]
    assert 1.0 not in values
    assert max(values) > 0.95


def race_of(clan, losses=None):
    """Its plan, and the population that enters it after a round with ``losses`` (all equal)."""
    losses = losses or [2.0] * clan.facts.population_size
    plans = rounds(clan)
    before = next(i for i, plan in enumerate(plans) if plan.end_step == 70)
    entered = clan.evolve(clan.init(START), plans[before], fitness_of(losses)).population
    return plans[before + 1], entered


def test_rates_start_lower_than_configured_but_not_below_their_bounds():
    clan, floor = build("clan", FACTS), build("clan", facts(genes=(Gene("lr", bounds=(0.9, 2.0)),)))
    assert math.exp(clan.init(START).memory["centre"]["lr"]) == pytest.approx(0.7)
    assert math.exp(floor.init(START).memory["centre"]["lr"]) == pytest.approx(0.9)


def test_trial_groups_train_apart_in_all_learning_rates_and_in_what_is_tied_to_them():
    genes = (replace(LR, name="lr:a"), replace(LR, name="lr:b"), Gene("eps"), WEIGHT_DECAY)
    plan, population = race_of(build("clan", facts(genes=genes, population_size=8)))
    assert plan.explores == ("lr:a", "lr:b")
    ratios = [genome.values["lr:a"] / population.genomes[0].values["lr:a"] for genome in population.genomes]
    assert ratios == pytest.approx([13 ** (place / 3) for place in (0, 0, 1, 1, 2, 2, 3, 3)])
    assert [genome.values["lr:b"] / genome.values["lr:a"] for genome in population.genomes] == pytest.approx([1.0] * 8)
    assert len({genome.values["eps"] for genome in population.genomes}) == 1
    products = [genome.values["weight_decay"] * genome.values["lr:a"] for genome in population.genomes]
    assert products == pytest.approx(products[:1] * 8)


def test_after_the_race_rates_rise_to_its_minimum_and_all_take_the_winners_state():
    clan = build("clan", FACTS, NO_PRIOR)
    plan, population = race_of(clan)
    decision = clan.evolve(population, plan, fitness_of([1.9, 1.5, 1.2, math.nan]))
    assert decision.donors == (2, 2, 2, 2)
    moved = decision.population.memory["centre"]["lr"] - population.memory["centre"]["lr"]
    assert moved == pytest.approx(0.9 * 2 / 3 * math.log(13))  # no parabola beside one who diverged
    assert decision.population.memory["moves"]["lr"]["why"] == "trial"


def test_a_race_lost_by_the_faster_leaves_the_rate():
    clan = build("clan", FACTS, NO_PRIOR)
    plan, population = race_of(clan)
    decision = clan.evolve(population, plan, fitness_of([1.2, 1.5, 1.6, 1.9]))
    assert decision.population.memory["centre"] == population.memory["centre"]


def test_rates_that_climb_by_themselves_need_no_race():
    clan = build("clan", FACTS, NO_PRIOR)
    offsets = [math.log(genome.values["lr"]) for genome in clan.init(START).genomes]
    plan, population = race_of(clan, [2.0 - offset for offset in offsets])
    assert population.memory["moves"]["lr"]["change"] > 0.6
    rates = [math.log(genome.values["lr"]) for genome in population.genomes]
    assert max(rates) - min(rates) < 0.5  # they spread as in any round, on the race's whole batches
    bowl = [2.0 + (rate - population.memory["centre"]["lr"] + 0.1) ** 2 for rate in rates]
    assert clan.evolve(population, plan, fitness_of(bowl)).population.memory["moves"]["lr"]["why"] == "minimum"


def overfitting(clan, *, validation=2.0, training=1.0):
    """The population after two rounds, in the second of which validation missed half of what training had gained."""
    first = clan.evolve(clan.init(START), clan.plan(0, 0), fitness_of([3.0] * 4, training_loss=3.1))
    assert first.population.memory["scale"] == 1.0 and not first.population.memory["overfits"]
    return clan.evolve(first.population, clan.plan(1, 20), fitness_of([validation] * 4, training_loss=training))


def test_a_clan_that_overfits_has_no_trial():
    clan = build("clan", FACTS)
    plan = next(p for p in rounds(clan) if p.start_step == 70)
    before = rounds(clan)[plan.index - 1]
    for training, distance in ((1.0, 1.0), (2.0, 13.0)):
        population = overfitting(clan, training=training).population
        entered = clan.evolve(population, before, fitness_of([1.9] * 4, training_loss=training - 0.1)).population
        rates = [genome.values["lr"] for genome in entered.genomes]
        assert max(rates) / min(rates) == pytest.approx(distance, rel=0.4)  # 0.1 of spread either way, or the race's


def test_a_clan_that_overfits_goes_no_higher_than_four_times_the_configured_rates():
    clan = build("clan", FACTS, {"start_factor": 20.0, **NO_PRIOR})
    held = overfitting(clan)
    assert math.exp(held.population.memory["centre"]["lr"]) == pytest.approx(4.0)
    assert held.reasons[held.donors[0]].endswith("; validation does not follow training: learning rates are held")
    assert math.exp(overfitting(clan, training=2.0).population.memory["centre"]["lr"]) == pytest.approx(20.0)


def test_the_guard_does_not_roll_back_a_clan_that_overfits_but_for_a_blow_up():
    clan = build("clan", FACTS, NO_RACE)
    held = overfitting(clan).population
    lost = clan.evolve(held, clan.plan(2, 40), fitness_of([3.0] * 4, training_loss=0.9))
    assert (lost.rolls_back, lost.takes_snapshot) == (False, False)
    assert lost.population.memory["centre"] == held.memory["centre"]
    assert clan.evolve(held, clan.plan(2, 40), fitness_of([4.5] * 4, training_loss=4.5)).rolls_back


def test_a_clan_that_overfits_raises_dropout_by_its_largest_change_whatever_a_round_says():
    clan = build("clan", facts(genes=(LR, DROPOUT)), NO_RACE)
    for training, change in ((1.0, 0.1), (2.0, None)):
        population = overfitting(clan, training=training).population
        same = fitness_of([1.95] * 4, training_loss=training)
        population = clan.evolve(population, clan.plan(2, 40), same).population
        plan = clan.plan(3, 60)
        assert plan.explores == ("dropout",)
        # Less dropout looks better in this round.
        losses = [1.9 + genome.values["dropout"] for genome in population.genomes]
        moves = clan.evolve(population, plan, fitness_of(losses, training_loss=training)).population.memory["moves"]
        if change is None:
            assert moves["dropout"]["change"] < 0
        else:
            assert moves["dropout"] == {"change": pytest.approx(DROPOUT.max_change), "why": "overfitting"}


@pytest.mark.parametrize(
    ("training", "end", "restores"),
    [
        (2.0, [2.5, 2.6, 2.6, 2.6], False),
        (2.0, [math.nan] * 4, True),
        (1.0, [2.001, 2.5, 2.5, 2.5], True),
        (1.0, [1.99, 2.5, 2.5, 2.5], False),
        (1.0, [math.nan] * 4, True),
    ],
    ids=["worse", "not finite", "memorizing and worse", "memorizing and better", "memorizing and not finite"],
)
def test_what_overfits_or_is_not_finite_is_not_what_a_run_ends_with(training, end, restores):
    clan = build("clan", FACTS)
    population = overfitting(clan, training=training).population
    assert clan.idle(population).takes_snapshot is (
        training == 2.0
    )  # no rollback to the reports of a clan that overfits
    decision = clan.evolve(population, rounds(clan)[-1], fitness_of(end))
    assert decision.rolls_back is restores
    assert decision.donors == (0, 1, 2, 3)
    if restores:
        # Reports are kept without a decision: their losses are not the one that is remembered.
        said = "no member's loss is finite" if training == 2.0 else "the loss of the last snapshot, 2, is better than"
        assert decision.reasons[0].startswith(f"rolled back: {said}")


def rounds(clan):
    plans = [clan.plan(0, 0)]
    while plans[-1].end_step < FACTS.total_steps:
        plans.append(clan.plan(len(plans), plans[-1].end_step))
    return plans
