from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from clantune_scale.bench.batched import BatchedClans, Settings
from clantune_scale.bench.batched.expression import rate_factor
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import STRATEGIES, RunFacts, build
from clantune_scale.errors import ConfigError
from clantune_scale.reference.clan import ReferenceClan
from tests.bench.batched.small_model import BATCH, NUM_EVAL_BATCHES, AsModule, Regression

P = 4
LR = Gene("lr", relative=True)
WEIGHT_DECAY = Gene("weight_decay", relative=True, max_change=0.1)
DROPOUT = Gene("dropout", kind="specialized", scale="linear", bounds=(0.0, 0.5), initial=0.1, step_size=0.05)
ACCUMULATION = Gene("accumulation", kind="specialized", bounds=(1, 64), initial=2.0, step_size=0.7, integer=True)
MOMENTUM = Gene("momentum", scale="logit", bounds=(0.5, 0.99), initial=0.9)
CLIP = Gene("clip", relative=True)

# Rows of a batched product are summed in another order than a product of their own: 1e-16 relative, which
# Adam's division and some dozen steps raise to about 1e-12.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def halving(step: int) -> float:
    return 0.97**step


ADAMW = Settings("adamw", lr=0.02, weight_decay=0.1)
SGD = Settings("sgd", lr=0.05, weight_decay=0.01, schedule=halving)


def strategy_of(name: str, *genes: Gene, seed: int = 3, total: int | None = 60, **options):
    return build(name, RunFacts(P, genes, seed, 6, duty_cycle=0.34, total_steps=total), options)


def batched(strategies, settings, seeds=(1, 2), members="groups", group_of=()) -> BatchedClans:
    return BatchedClans(
        Regression(group_of),
        strategies=strategies,
        settings=settings,
        seeds=seeds,
        num_eval_batches=NUM_EVAL_BATCHES,
        dtype=torch.float64,
        members=members,
    )


def reference(strategy, settings: Settings, seed: int, members="groups", group_of=()) -> ReferenceClan:
    model = Regression(group_of)

    def batch(step: int, member: int, micro: int, plan):
        place, width = (plan.team_index, plan.team_size) if plan.is_common else (member, P)
        part, first = divmod((micro * width + place) * BATCH // P, BATCH)
        return [column[first : first + BATCH // P] for column in model.batch(seed, step, part)]

    def optimizer(parameters):
        parameters = in_groups(list(parameters), settings, group_of) if group_of else parameters
        if settings.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        return torch.optim.SGD(parameters, lr=settings.lr, weight_decay=settings.weight_decay, momentum=0.9)

    return ReferenceClan(
        AsModule(model, seed),
        strategy=strategy,
        optimizer=optimizer,
        scheduler=lambda own: torch.optim.lr_scheduler.LambdaLR(own, settings.schedule),
        loss_fn=lambda module, samples: module(samples),
        batch=batch,
        eval_batches=list(zip(*(x.chunk(NUM_EVAL_BATCHES) for x in model.validation), strict=True)),
        num_micro_batches=settings.num_micro_batches,
        clip=settings.clip,
        setters={"dropout": lambda module, value: setattr(module, "rate", value)},
        members=members,
    )


def in_groups(parameters, settings: Settings, group_of) -> list[dict]:
    """The parameter groups that these names make."""
    return [
        {
            "params": [p for p, group in zip(parameters, group_of, strict=True) if group == name],
            "name": name,
            "lr": settings.lr * settings.group_rates.get(name, 1.0),
        }
        for name in dict.fromkeys(group_of)
    ]


def assert_agree(clans: BatchedClans, twins: list[ReferenceClan]) -> None:
    """Weights, averages, genomes and decisions of every member."""
    for index, twin in enumerate(twins):
        for role, name in (("weights", "parameters"), ("average", "average")):
            own = getattr(clans.state, role)[index]
            expected = torch.stack([torch.cat([t.detach().flatten() for t in getattr(m, name)]) for m in twin.members])
            torch.testing.assert_close(own, expected, **TOLERANCE)
        clan = clans.clans[index]
        assert [d and d.donors for d in clan.decisions] == [d and d.donors for d in twin.decisions]
        for own, expected in zip(clan.population.genomes, twin.population.genomes, strict=True):
            assert own.values == pytest.approx(expected.values, rel=1e-6)  # a parabola's minimum magnifies rounding


def run_both(name: str, settings: Settings, *genes: Gene, num_steps: int = 30, **options):
    """Two clans that differ in seed, rate and strategy seed, and a twin of each, compared at every step."""
    own = [settings, replace(settings, lr=settings.lr / 3)]
    clans = batched([strategy_of(name, *genes, seed=s, **options) for s in (3, 4)], own)
    twins = [reference(strategy_of(name, *genes, seed=s, **options), own[s - 3], s - 2) for s in (3, 4)]
    for _ in range(num_steps):
        clans.step()
        for twin in twins:
            twin.step()
        assert_agree(clans, twins)
    return clans, twins


@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_does_what_the_reference_does(name, settings):
    clans, _ = run_both(name, settings, LR, WEIGHT_DECAY)
    assert len(clans.clans[0].lineage) >= 4


@pytest.mark.parametrize("name", ["clan", "halving"])
def test_a_decay_over_the_users_own_is_that_of_the_reference(name):
    def falling(step: int) -> float:
        """The line is below it to begin with (clan: from step 24 on), then it falls faster."""
        return 0.99**step if step < 45 else 0.3 * 0.8 ** (step - 45)

    clans, twins = run_both(name, replace(SGD, schedule=falling), LR, num_steps=60)
    settings, strategy = clans.clans[0].settings, clans.clans[0].strategy
    below = [rate_factor(settings, strategy, step) < falling(step) for step in range(60)]
    start = strategy.decay_start_step
    assert not any(below[: start + 1]) and below[start + 5] and not below[50]
    assert twins[0].members[0].optimizer.param_groups[0]["lr"] == pytest.approx(SGD.lr * falling(60))


@pytest.mark.parametrize("name", ["clan", "classic"])
def test_specialized_genes_compete_as_in_the_reference(name):
    clans, _ = run_both(name, replace(ADAMW, knobs={"dropout": 0.1}), LR, DROPOUT, ACCUMULATION)
    rates = [genome.values["dropout"] for record in clans.clans[0].lineage for genome in record.genomes]
    assert len(set(rates)) > P  # the gene moved, so that agreement says something


def test_momentum_clip_and_accumulation_as_in_the_reference():
    run_both("classic", replace(SGD, clip=0.05, num_micro_batches=2), LR, MOMENTUM, CLIP)


def test_members_of_a_team_share_gradients_and_data_as_in_the_reference():
    class Teams(type(strategy_of("control", LR))):
        """The clans' teams differ: three and one alone in one, a pair and two alone in the other."""

        def init(self, start):
            return replace(super().init(start), teams=(0, 0, 0, 3) if self.facts.seed == 3 else (0, 1, 1, 3))

    def teams(seed: int):
        plain = strategy_of("control", LR, seed=seed, competes=True)
        return Teams(plain.facts, plain.options)

    clans = batched([teams(3), teams(4)], [ADAMW, ADAMW])
    twins = [reference(teams(seed), ADAMW, seed - 2) for seed in (3, 4)]
    for _ in range(5):
        clans.step()
        for twin in twins:
            twin.step()
    assert_agree(clans, twins)
    first, second = clans.state.weights
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[3])
    assert torch.equal(second[1], second[2]) and not torch.equal(second[0], second[1])


def test_a_clan_that_blows_up_goes_back_alone():
    settings = [replace(SGD, lr=30.0), SGD]
    clans = batched([strategy_of("clan", LR), strategy_of("clan", LR)], settings)
    twins = [reference(strategy_of("clan", LR), own, seed) for own, seed in zip(settings, (1, 2), strict=True)]
    for _ in range(12):
        clans.step()
        for twin in twins:
            twin.step()
    assert [decision.rolls_back for decision in (c.decisions[0] for c in clans.clans)] == [True, False]
    assert_agree(clans, twins)
    assert clans.clans[0].population.memory["centre"]["lr"] <= -math.log(3)


def test_a_clan_whose_strategy_gives_up_does_not_stop_the_others():
    clans = batched([strategy_of("classic", LR)] * 2, [replace(SGD, lr=1e200), SGD])
    clans.run(18)
    lost, kept = clans.clans
    assert "none of the 4 members has a finite validation loss" in str(lost.failure)
    assert kept.failure is None and all(kept.decisions)
    assert lost.decisions == [None] * 3
    alone = batched([strategy_of("classic", LR)], [SGD], seeds=(2,))
    alone.run(18)
    torch.testing.assert_close(clans.state.weights[1], alone.state.weights[0], **TOLERANCE)


def test_clans_of_a_batch_do_not_meet():
    both = batched([strategy_of("classic", LR, seed=s) for s in (3, 4)], [ADAMW, ADAMW])
    alone = batched([strategy_of("classic", LR, seed=4)], [ADAMW], seeds=(2,))
    both.run(20)
    alone.run(20)
    torch.testing.assert_close(both.state.weights[1], alone.state.weights[0], **TOLERANCE)


def test_what_members_share_is_stored_once_until_they_differ():
    together = batched([strategy_of("clan", LR)] * 2, [ADAMW, ADAMW])
    together.run(12)
    assert together.state.slots["exp_avg"].shape[1] == 1
    apart = batched([strategy_of("classic", LR)] * 2, [ADAMW, ADAMW])
    apart.run(12)
    assert apart.state.slots["exp_avg"].shape[1] == P


def test_cost_is_counted_in_samples():
    clans = batched([strategy_of("clan", LR)] * 2, [ADAMW, replace(ADAMW, num_micro_batches=2)])
    clans.run(6)
    assert [clan.num_trained for clan in clans.clans] == [6 * BATCH, 12 * BATCH]
    assert clans.clans[0].num_evaluated == P * 6 * NUM_EVAL_BATCHES


def test_a_gene_that_nothing_takes_is_refused():
    with pytest.raises(ConfigError, match="sets 'momentum'"):
        batched([strategy_of("clan", MOMENTUM)], [ADAMW], seeds=(1,)).step()


def test_members_that_cannot_share_a_batch_are_refused():
    facts = RunFacts(5, (LR,), 0, 6, duty_cycle=0.1)
    with pytest.raises(ConfigError, match="24 samples cannot be shared out evenly by 5 members"):
        batched([build("control", facts)], [ADAMW], seeds=(1,))
